"""Root mean square normalisation on a GPU: a program holds a whole row, so nothing of the batch enters its sum.

# T tokens, D model width
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.graph import empty
from engine.kernels.triton.column_sum import add_column_sums_
from engine.kernels.triton.launch import launch

_GRADIENT_ROWS = 16  # of a program of the backward, whose sum for the weight's gradient is then written once


def forward(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, save: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x + delta (x itself without one), its norm, and 1 / root mean square float32 [T]."""
    rows, width = x.shape
    total = x if delta is None else empty((rows, width), x.dtype, x.device)
    out = empty((rows, width), x.dtype, x.device)
    # Kept whether asked for or not: one kernel for training and for sampling.
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    block, num_warps = _tile(width)
    launch(_forward, (rows,), x, delta, weight, total, out, rstd, width, eps, BLOCK=block, num_warps=num_warps)
    return total, out, rstd


def backward(
    dy: Tensor, d_sum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, eps: float, weight_grad: Tensor
) -> Tensor:
    """Gradient of x, with that of the sum (`d_sum`) added before it is rounded; the weight's is added to its buffer."""
    rows, width = x.shape
    dx = empty((rows, width), x.dtype, x.device)
    chunks = triton.cdiv(rows, _GRADIENT_ROWS)
    partial = torch.empty((chunks, width), dtype=torch.float32, device=x.device)
    block, num_warps = _tile(width)
    tiles = {"ROWS": _GRADIENT_ROWS, "BLOCK": block}
    inputs = (dy, d_sum, x, weight, rstd, dx, partial)
    # One stage: a second one spills, and 16 warps give a thread of a row of 16,384 its 128 registers.
    launch(_backward, (chunks,), *inputs, rows, width, **tiles, num_warps=min(16, num_warps), num_stages=1)
    add_column_sums_(partial, weight_grad)
    return dx


def _tile(width: int) -> tuple[int, int]:
    """Columns that a program holds, and its warps: 16 elements a thread up to rows of 16,384."""
    block = max(64, triton.next_power_of_2(width))
    return block, min(32, max(1, block // 512))


@triton.jit
def _forward(x, delta, weight, total, out, rstd, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row * width + columns, mask=inside, other=0.0)
    if delta is not None:
        other = tl.load(delta + row * width + columns, mask=inside, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(value.dtype)
        tl.store(total + row * width + columns, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(wide * wide, axis=0) / width + eps))
    tl.store(rstd + row, scale)
    normed = (wide * scale).to(value.dtype).to(tl.float32)
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, (normed * factor).to(value.dtype), mask=inside)


@triton.jit
def _backward(dy, d_sum, x, weight, rstd, dx, partial, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """dx = rstd (dn - x rstd^2 mean(dn x)) + d_sum, dn = dy weight; partial = the sum of dy round(x rstd)."""
    chunk = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight_grad = tl.zeros([BLOCK], tl.float32)
    for row in range(chunk * ROWS, min(chunk * ROWS + ROWS, rows)):
        at = tl.cast(row, tl.int64) * width + columns
        d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        narrow = tl.load(x + at, mask=inside, other=0.0)
        value = narrow.to(tl.float32)
        scale = tl.load(rstd + row)
        factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)  # from the cache: registers are dear
        d_normed = d * factor
        mean = scale * scale * (tl.sum(d_normed * value, axis=0) / width)
        grad = (d_normed - value * mean) * scale
        if d_sum is not None:
            grad += tl.load(d_sum + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, grad.to(narrow.dtype), mask=inside)
        weight_grad += d * (value * scale).to(narrow.dtype).to(tl.float32)
    tl.store(partial + tl.cast(chunk, tl.int64) * width + columns, weight_grad, mask=inside)
