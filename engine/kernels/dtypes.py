"""What the engine computes in: the kernels' dtypes, and float64, which only the torch definitions take."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.config import DTYPES, KV_DTYPE_NAMES

KERNEL_DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # as csrc/cpu/common.h numbers them
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODEL_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}
KV_DTYPES: dict[str, torch.dtype | None] = dict(zip(KV_DTYPE_NAMES, (None, torch.float8_e4m3fn), strict=True))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a model of `dtype` sums in and keeps logits, gradients and optimizer state in: float64 or float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """`x` in the dtype it is summed in."""
    return x.to(wide_dtype(x.dtype))
