"""Rounding to e4m3, alone in a kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.launch import launch
from engine.kernels.triton.rotate import to_e4m3
from tests.kernels.triton.cases import DEVICE


def rounded(x: Tensor) -> Tensor:
    """fp32 [n] to fp32 [n]."""
    x = x.to(DEVICE)
    y = torch.empty_like(x)
    launch(_round, (triton.cdiv(len(x), 1024),), x, y, len(x), BLOCK=1024)
    return y.cpu()


@triton.jit
def _round(x, y, length, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, to_e4m3(tl.load(x + at, mask=at < length, other=0.0)), mask=at < length)
