"""What the tests of Triton kernels share. Without a GPU they run in the interpreter, on the CPU, where bf16 matrix
products are wrong (Triton's own limitation): tests there use float32 and float16. The simulator (tests/ptx/plugin.py)
runs them in bf16 too."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from engine.kernels.attention import AttentionSpec
from engine.kernels.op import triton_missing, use_backend
from engine.kernels.weight import Weight
from tests import row_invariance
from tests.kernels.cases import randn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]
# For kernels of a program a row, whose number no tile depends on: the interpreter takes milliseconds for each.
PADDING = ((1, 0), (0, 1), (3, 2)) if DEVICE == "cpu" else row_invariance.PADDING
needs_triton = pytest.mark.skipif(bool(triton_missing()), reason=triton_missing() or "installed")


def device_weight(values: Tensor, dtype: torch.dtype, grad: float = 0.0) -> Weight:
    """A dense weight on DEVICE, whose gradient so far is `grad` everywhere."""
    with use_backend("triton"), torch.device(DEVICE):
        weight = Weight("w", tuple(values.shape), dtype, packed=values.dim() == 2)
    weight.load_(values)
    weight.grad_buffer().fill_(grad)
    return weight


def norms_of(spec: AttentionSpec, dtype: torch.dtype) -> list[Weight]:
    """Weights of the norms of queries and keys, on DEVICE."""
    return [device_weight(randn(spec.head_dim, seed=seed).abs() + 0.5, dtype) for seed in range(2)]
