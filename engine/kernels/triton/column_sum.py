"""Sums over rows, column by column, in an order that the number of rows alone decides: gradients of vectors.

# R rows, W columns
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.launch import launch

_CHUNK = 256  # rows that one program sums
_ROWS = 16  # of them at a time: loads of 16 rows are under way together
_COLUMNS = 64


def add_column_sums_(x: Tensor, out: Tensor) -> None:
    """out [W] float32 += the sum of x's rows [R, W], in float32. Rows of x may lie apart, elements not.

    Chunks of 256 rows are summed to a row each, and these in turn until one is left. With no rows `out` stays as it is.
    """
    while x.shape[0] > _CHUNK:
        partial = torch.empty((triton.cdiv(x.shape[0], _CHUNK), x.shape[1]), dtype=torch.float32, device=x.device)
        _launch(x, partial, add=False)
        x = partial
    _launch(x, out, add=True)


def _launch(x: Tensor, out: Tensor, add: bool) -> None:
    rows, width = x.shape
    grid = (triton.cdiv(rows, _CHUNK), triton.cdiv(width, _COLUMNS))
    tiles = {"CHUNK": _CHUNK, "ROWS": _ROWS, "COLUMNS": _COLUMNS}
    launch(_sum_chunks, grid, x, x.stride(0), out, rows, width, ADD=add, **tiles, num_warps=4, num_stages=3)


@triton.jit
def _sum_chunks(
    x, stride, out, rows, width, ADD: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    chunk = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, CHUNK, ROWS):
        row = chunk * CHUNK + first + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * stride + columns[None, :]
        total += tl.load(x + at, mask=(row < rows)[:, None] & inside[None, :], other=0.0).to(tl.float32)
    sums = tl.sum(total, axis=0)
    to = out + chunk.to(tl.int64) * width + columns
    if ADD:
        sums += tl.load(to, mask=inside, other=0.0)
    tl.store(to, sums, mask=inside)
