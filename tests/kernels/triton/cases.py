"""What the tests of Triton kernels share. Without a GPU they run in the interpreter, on the CPU, where bf16 matrix
products are wrong (Triton's own limitation): tests there use float32 and float16."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.op import triton_missing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
needs_triton = pytest.mark.skipif(bool(triton_missing()), reason=triton_missing() or "installed")
