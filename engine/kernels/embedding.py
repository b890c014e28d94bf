"""Rows of the embedding matrix, and the root of the autograd graph.

# T tokens, V vocabulary, D model width
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.errors import InputError
from engine.kernels.checks import address, check, dtype_code
from engine.kernels.graph import empty
from engine.kernels.op import Backend, Op, cpu_missing, extension
from engine.kernels.weight import Weight

# Weights are no autograd leaves (their gradients go to Weight.grad_buffer()) and ids have none; a graph needs a root.
_anchor = torch.zeros(0, requires_grad=True)


def embedding(tokens: Tensor, weight: Weight) -> Tensor:
    """weight[tokens]: int32 [T] -> [T, D] in the weight's dtype; `weight` is dense or packed (a tied head's).

    With grad enabled the result requires grad, and its backward adds each token's gradient, in the order of the
    tokens, to `weight.grad_buffer()`. Raises InputError for an id outside the vocabulary (a recorded call raises
    IndexError when it is replayed).
    """
    check("tokens", tokens, (None,), torch.int32)
    if torch.is_grad_enabled():
        return _Embedding.apply(_anchor, tokens, weight)
    return EMBEDDING["forward"](tokens, weight)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tokens: Tensor, weight: Weight) -> Tensor:
        ctx.backend, ctx.weight = EMBEDDING.chosen(), weight
        ctx.save_for_backward(tokens)
        return ctx.backend.functions["forward"](tokens, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        ctx.backend.functions["backward"](*ctx.saved_tensors, dy.contiguous(), ctx.weight.grad_buffer())
        return None, None, None


def _forward_cpu(tokens: Tensor, weight: Weight) -> Tensor:
    vocab, width = weight.shape
    rows = tokens.shape[0]
    out = empty((rows, width), weight.dtype)
    code, source = dtype_code(weight.dtype), (address(tokens), address(weight.data), weight.packed)
    try:
        extension().embedding(code, *source, address(out), rows, vocab, width)
    except IndexError as error:
        raise InputError(str(error)) from None
    return out


def _backward_cpu(tokens: Tensor, dy: Tensor, weight_grad: Tensor) -> None:
    code = dtype_code(dy.dtype)
    extension().embedding_backward(code, address(tokens), address(dy), address(weight_grad), *dy.shape)


def _forward_torch(tokens: Tensor, weight: Weight) -> Tensor:
    wrong = ((tokens < 0) | (tokens >= weight.shape[0])).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise InputError(f"token id {int(tokens[at])} at index {at} is outside the vocabulary of {weight.shape[0]} ids")
    return weight.dense()[tokens.long()]


def _backward_torch(tokens: Tensor, dy: Tensor, weight_grad: Tensor) -> None:
    weight_grad.index_put_((tokens.long(),), dy.to(weight_grad.dtype), accumulate=True)


EMBEDDING = Op(
    "embedding",
    [
        Backend("cpu", {"forward": _forward_cpu, "backward": _backward_cpu}, cpu_missing),
        Backend("torch", {"forward": _forward_torch, "backward": _backward_torch}),
    ],
)
