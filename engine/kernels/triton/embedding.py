"""Rows of the embedding matrix on a GPU, and its gradient without atomics.

# T tokens, N rows of the table that are held here, D model width
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.graph import empty
from engine.kernels.triton.launch import launch
from engine.kernels.weight import Weight

_BLOCK = 1024  # columns of a program: 8 elements for each of 128 threads, 16 bytes of bf16
_ROWS, _COLUMNS = 8, 512  # of a program of the backward at a time: 8 rows of gradients are under way together


def forward(tokens: Tensor, weight: Weight, first_row: int | None) -> Tensor:
    """See `engine.kernels.embedding.embedding`; without `first_row`, an id outside the table gives a row of NaN."""
    (held, width), rows = weight.shape, tokens.shape[0]
    out = empty((rows, width), weight.dtype, tokens.device)
    outside = float("nan") if first_row is None else 0.0
    grid = (rows, triton.cdiv(width, _BLOCK))
    launch(_forward, grid, tokens, weight.data, out, held, width, first_row or 0, outside, BLOCK=_BLOCK)
    return out


def backward(tokens: Tensor, dy: Tensor, weight_grad: Tensor, first_row: int | None) -> None:
    """weight_grad[token - first_row] += the token's rows of dy, summed in float32 in the order of the tokens."""
    rows, width = dy.shape
    ids, order = torch.sort(tokens, stable=True)  # an id's rows lie together, in their order
    grid = (rows, triton.cdiv(width, _COLUMNS))
    sizes = (rows, weight_grad.shape[0], width, first_row or 0)
    launch(_backward, grid, ids, order, dy, weight_grad, *sizes, ROWS=_ROWS, COLUMNS=_COLUMNS)


@triton.jit
def _forward(tokens, weight, out, held, width, first_row, outside, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + row).to(tl.int64) - first_row
    here = (token >= 0) & (token < held)
    value = tl.load(weight + token * width + columns, mask=columns < tl.where(here, width, 0), other=outside)
    tl.store(out + row * width + columns, value, mask=columns < width)


@triton.jit
def _backward(
    ids, order, dy, weight_grad, rows, held, width, first_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """One program for each place in the sorted ids works if an id's run begins there, and walks the run."""
    first = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    token = tl.load(ids + first)
    begins = (first == 0) | (tl.load(ids + first - 1, mask=first > 0, other=0) != token)
    target = token.to(tl.int64) - first_row
    if begins & (target >= 0) & (target < held):
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        goes_on = True
        while goes_on:
            place = first + tl.arange(0, ROWS)
            same = tl.load(ids + place, mask=place < rows, other=-1) == token
            same = same & (place < rows)
            row = tl.load(order + place, mask=same, other=0)
            at = dy + row[:, None] * width + columns[None, :]
            total += tl.load(at, mask=same[:, None] & inside[None, :], other=0.0).to(tl.float32)
            first += ROWS
            goes_on = tl.sum(same.to(tl.int32), axis=0) == ROWS
        to = weight_grad + target * width + columns
        tl.store(to, tl.load(to, mask=inside, other=0.0) + tl.sum(total, axis=0), mask=inside)
