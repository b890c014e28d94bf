"""Rows of the embedding matrix, and the root of the autograd graph.

# T tokens, V vocabulary (or the N rows of it that are held here), D model width
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.errors import InputError
from engine.kernels.checks import address, check, dtype_code
from engine.kernels.dtypes import KERNEL_DTYPES, TRITON_DTYPES
from engine.kernels.graph import empty
from engine.kernels.op import Backend, Op, cpu_backend, extension, triton_backend
from engine.kernels.weight import Weight

# Weights are no autograd leaves (their gradients go to Weight.grad_buffer()) and ids have none; a graph needs a root.
_anchor = torch.zeros(0, requires_grad=True)


def embedding(tokens: Tensor, weight: Weight, first_row: int | None = None) -> Tensor:
    """weight[tokens]: int32 [T] -> [T, D] in the weight's dtype; `weight` is dense or packed (a tied head's).

    With `first_row` the weight holds rows [first_row, first_row + N) of a bigger table: an id outside of them gives a
    row of zeros and no gradient, so the sum over all shards of the table is the whole table's embedding.

    With grad enabled the result requires grad, and its backward adds each token's gradient, in the order of the
    tokens, to `weight.grad_buffer()`. Without `first_row`, raises InputError for an id outside the vocabulary (a
    recorded call raises IndexError when it is replayed); ids on a GPU are not read back, and such an id's row is NaN.
    Raises InputError for a negative `first_row` and for tokens on another device than the weight.
    """
    check("tokens", tokens, (None,), torch.int32, weight.data.device)
    if first_row is not None and first_row < 0:
        raise InputError(f"first_row is {first_row}; a shard begins at row 0 of its table or after it")
    if torch.is_grad_enabled():
        return _Embedding.apply(_anchor, tokens, weight, first_row)
    return EMBEDDING["forward", weight.data](tokens, weight, first_row)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tokens: Tensor, weight: Weight, first_row: int | None) -> Tensor:
        ctx.backend, ctx.weight, ctx.first_row = EMBEDDING.serving(weight.data), weight, first_row
        ctx.save_for_backward(tokens)
        return ctx.backend.functions["forward"](tokens, weight, first_row)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, None, None]:  # type: ignore[override]
        (tokens,) = ctx.saved_tensors
        ctx.backend.functions["backward"](tokens, dy.contiguous(), ctx.weight.grad_buffer(), ctx.first_row)
        return None, None, None, None


def _forward_cpu(tokens: Tensor, weight: Weight, first_row: int | None) -> Tensor:
    vocab, width = weight.shape
    rows = tokens.shape[0]
    out = empty((rows, width), weight.dtype)
    code, source = dtype_code(weight.dtype), (address(tokens), address(weight.data), weight.packed)
    try:
        extension().embedding(code, *source, address(out), rows, vocab, width, _first(first_row))
    except IndexError as error:
        raise InputError(str(error)) from None
    return out


def _backward_cpu(tokens: Tensor, dy: Tensor, weight_grad: Tensor, first_row: int | None) -> None:
    addresses = (address(tokens), address(dy), address(weight_grad))
    extension().embedding_backward(dtype_code(dy.dtype), *addresses, len(tokens), *weight_grad.shape, _first(first_row))


def _first(first_row: int | None) -> int:
    return extension().WHOLE_TABLE if first_row is None else first_row


def _forward_torch(tokens: Tensor, weight: Weight, first_row: int | None) -> Tensor:
    if first_row is not None:
        local, here = _local(tokens, weight.shape[0], first_row)
        return torch.where(here[:, None], weight.dense()[local], 0)
    wrong = ((tokens < 0) | (tokens >= weight.shape[0])).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise InputError(f"token id {int(tokens[at])} at index {at} is outside the vocabulary of {weight.shape[0]} ids")
    return weight.dense()[tokens.long()]


def _backward_torch(tokens: Tensor, dy: Tensor, weight_grad: Tensor, first_row: int | None) -> None:
    local, here = _local(tokens, weight_grad.shape[0], first_row or 0)
    weight_grad.index_put_((local[here],), dy[here].to(weight_grad.dtype), accumulate=True)


def _local(tokens: Tensor, rows: int, first_row: int) -> tuple[Tensor, Tensor]:
    """Each token's row of the shard (0 where it has none), and whether it has one."""
    local = tokens.long() - first_row
    here = (local >= 0) & (local < rows)
    return local.where(here, 0), here


EMBEDDING = Op(
    "embedding",
    [
        cpu_backend({"forward": _forward_cpu, "backward": _backward_cpu}, KERNEL_DTYPES),
        triton_backend("embedding", "forward", "backward", dtypes=TRITON_DTYPES),
        Backend("torch", {"forward": _forward_torch, "backward": _backward_torch}),
    ],
)
