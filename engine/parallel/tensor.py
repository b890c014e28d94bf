"""Tensor parallelism (arXiv 1909.08053) with sequence parallelism (arXiv 2205.05198) as an option.

                 column_linear                  row_linear
    x  ------>  [T, D] x [N/p, D]^T  -> ... ->  [T, N/p] x [D, N/p]^T  ->  sum over ranks, in rank order

The partial sums of a row-parallel matmul travel in float32, are folded in rank order, take the bias, and are rounded
once. Whether every rank then keeps all rows, or its share of them (`rows` given: sequence parallel), changes no bit of
any row, so sampling, which keeps all, and training, which may share them out, see the same log-probabilities.

Backward, the collective of the input's gradient runs while the weight's gradient is computed.

# T tokens, p ranks, S = ceil(T / p) rows of a share, D model width, N columns of the whole output, V vocabulary
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.kernels.dtypes import wide_dtype
from engine.kernels.embedding import embedding
from engine.kernels.graph import empty, host_call
from engine.kernels.linear import linear, linear_grad_bias_, linear_grad_input, linear_grad_weight_
from engine.kernels.memory import unowned
from engine.kernels.weight import Weight
from engine.parallel.collectives import (
    Group,
    Pending,
    all_gather,
    all_reduce,
    fold,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)


def column_linear(x: Tensor, weight: Weight, bias: Weight | None, group: Group, rows: int | None = None) -> Tensor:
    """This rank's columns of y: [T, D] -> [T, N/p], or, with `rows` = T, from a share of the rows [S, D] of x."""
    if group.size == 1:
        return linear(x, weight, bias)
    if torch.is_grad_enabled() and x.requires_grad:
        return _ColumnLinear.apply(x, weight, bias, group, rows)
    return linear(x if rows is None else _all_rows(x, group, rows), weight, bias)


def row_linear(x: Tensor, weight: Weight, bias: Weight | None, group: Group, rows: int | None = None) -> Tensor:
    """y from this rank's columns of x: [T, N/p] -> [T, D], or, with `rows` = T, a share of its rows [S, D]."""
    if group.size == 1:
        return linear(x, weight, bias)
    if torch.is_grad_enabled() and x.requires_grad:
        return _RowLinear.apply(x, weight, bias, group, rows)
    return _row_forward(x, weight, bias, group, rows)


def vocabulary_embedding(
    tokens: Tensor, weight: Weight, first_row: int, group: Group, rows: int | None = None
) -> Tensor:
    """Embeddings from a table whose rows [first_row, ...) this rank holds: int32 [T] -> [T, D], or a share [S, D]."""
    if group.size == 1:
        return embedding(tokens, weight)
    partial = embedding(tokens, weight, first_row)  # [T, D], zeros for the other ranks' tokens
    if partial.requires_grad:
        return _Sum.apply(partial, group, rows)
    return _sum(partial, None, partial.dtype, group, rows)


def all_rows(x: Tensor, group: Group, rows: int | None = None) -> Tensor:
    """All rows on every rank: [S, D] -> [T, D] (or x itself where it has them all). Backward sums what the ranks, each
    with its part of what comes next, hold of the gradient."""
    if group.size == 1:
        return x
    if torch.is_grad_enabled() and x.requires_grad:
        return _AllRows.apply(x, group, rows)
    return x if rows is None else _all_rows(x, group, rows)


def sum_shared_rows(shared: list[tuple[Tensor, range]], group: Group) -> None:
    """In place, the sum of each tensor over the ranks at the places beside it, in their order; one exchange for all."""
    if not shared or group.size == 1:
        return
    everyone = all_gather(torch.cat([tensor.reshape(-1) for tensor, _ in shared]), group)  # [p, all elements]
    for (tensor, holders), pieces in zip(shared, everyone.split([t.numel() for t, _ in shared], 1), strict=True):
        tensor.copy_(fold(pieces[holders.start : holders.stop]).view(tensor.shape))


class _ColumnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, bias: Weight | None, group: Group, rows: int | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.group, ctx.rows = weight, bias, group, rows
        return linear(x if rows is None else _all_rows(x, group, rows), weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        gathering = None if ctx.rows is None else start_all_gather(x, ctx.group)
        reducing = _start_sum(linear_grad_input(dy, ctx.weight), ctx.group, ctx.rows)
        if ctx.bias is not None:
            linear_grad_bias_(dy, ctx.bias)
        full = x if gathering is None else gathering.wait().flatten(0, 1)[: ctx.rows]
        linear_grad_weight_(dy, full, ctx.weight)
        return reducing.wait().to(x.dtype), None, None, None, None


class _RowLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, bias: Weight | None, group: Group, rows: int | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.group, ctx.rows = weight, bias, group, rows
        return _row_forward(x, weight, bias, group, rows)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        gathering = None if ctx.rows is None else start_all_gather(dy.contiguous(), ctx.group)
        if ctx.bias is not None:
            linear_grad_bias_(dy, ctx.bias)
        full = dy if gathering is None else gathering.wait().flatten(0, 1)[: ctx.rows]
        dx = linear_grad_input(full, ctx.weight)
        linear_grad_weight_(full, x, ctx.weight)
        return dx, None, None, None, None


class _Sum(torch.autograd.Function):
    """Forward sums over ranks; backward hands every rank the whole gradient."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: Group, rows: int | None) -> Tensor:
        ctx.group, ctx.rows = group, rows
        return _sum(partial, None, partial.dtype, group, rows)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return dy if ctx.rows is None else _all_rows(dy.contiguous(), ctx.group, ctx.rows), None, None


class _AllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, rows: int | None) -> Tensor:
        ctx.group, ctx.rows = group, rows
        return x.view_as(x) if rows is None else _all_rows(x, group, rows)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _start_sum(dy, ctx.group, ctx.rows).wait().to(dy.dtype), None, None


def _row_forward(x: Tensor, weight: Weight, bias: Weight | None, group: Group, rows: int | None) -> Tensor:
    return _sum(linear(x, weight, out_dtype=wide_dtype(x.dtype)), bias, x.dtype, group, rows)


def _sum(partial: Tensor, bias: Weight | None, dtype: torch.dtype, group: Group, rows: int | None) -> Tensor:
    """The sum over ranks plus the bias, rounded once to `dtype`; a recorded forward sums what it finds at replay."""
    if rows is not None:
        return _with_bias(_start_sum(partial, group, rows).wait(), bias).to(dtype)
    out = empty(tuple(partial.shape), dtype, partial.device)
    source, target = unowned(partial), unowned(out)

    def run(now: int) -> None:
        target[:now] = _with_bias(all_reduce(source[:now], group), bias)

    host_call(run, partial.shape[0])
    return out


def _with_bias(total: Tensor, bias: Weight | None) -> Tensor:
    return total if bias is None else total + bias.dense(dtype=total.dtype)


def _start_sum(partial: Tensor, group: Group, rows: int | None) -> Pending[Tensor]:
    """The sum over ranks: all rows of it, or this rank's share (the last shares are filled up with zeros)."""
    if rows is None:
        return start_all_reduce(partial, group)
    return start_reduce_scatter(torch.nn.functional.pad(partial, (0, 0, 0, -rows % group.size)), group)


def _all_rows(x: Tensor, group: Group, rows: int) -> Tensor:
    return all_gather(x, group).flatten(0, 1)[:rows]  # [S, D] -> [p, S, D] -> [T, D]
