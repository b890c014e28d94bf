"""Root mean square normalisation, alone or fused with the residual addition in front of it (arXiv 1910.07467).

# T tokens, D model width
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.kernels.checks import address, check, dtype_code
from engine.kernels.dtypes import KERNEL_DTYPES, TRITON_DTYPES, wide
from engine.kernels.graph import empty
from engine.kernels.op import Backend, Op, cpu_backend, extension, triton_backend
from engine.kernels.weight import Weight


def rms_norm(x: Tensor, weight: Weight, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, over each row: [T, D] -> [T, D] in x's dtype.

    The mean and the division are float32 (float64 for float64); the quotient is rounded to x's dtype before it meets
    the weight, as Hugging Face's Llama does. Where x requires grad, the backward adds the weight's gradient to
    `weight.grad_buffer()`. Raises InputError for a shape or dtype that does not fit.
    """
    _check(x, weight)
    if torch.is_grad_enabled() and x.requires_grad:
        return _RMSNorm.apply(x, weight, eps)
    return RMS_NORM["forward", x](x, None, weight.data, eps, False)[1]


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Weight, eps: float) -> tuple[Tensor, Tensor]:
    """The residual stream after an addition and its norm: [T, D], [T, D] -> (x + delta, rms_norm(x + delta)).

    The sum is rounded to the dtype before it is normalised, so this equals the two steps apart to the last bit. With
    delta None, x is the sum already (as between two stages of a pipeline): the outputs and the gradient of the sum,
    which is rounded once, have the bits that they would have had with the addition in here. Gradients and errors are
    those of `rms_norm`.
    """
    _check(x, weight)
    if delta is not None:
        check("delta", delta, tuple(x.shape), x.dtype, x.device)
    if torch.is_grad_enabled() and (x.requires_grad or (delta is not None and delta.requires_grad)):
        return _AddRMSNorm.apply(x, delta, weight, eps)
    return RMS_NORM["forward", x](x, delta, weight.data, eps, False)[:2]


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition in plain torch."""
    y = wide(x)
    rstd = torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (y * rstd).to(x.dtype)


def _check(x: Tensor, weight: Weight) -> None:
    check("x", x, (None, None))
    check("weight", weight.data, (x.shape[1],), x.dtype, x.device)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, eps: float) -> Tensor:
        ctx.backend, ctx.weight, ctx.eps = RMS_NORM.serving(x), weight, eps
        _, out, rstd = ctx.backend.functions["forward"](x, None, weight.data, eps, True)
        ctx.save_for_backward(x, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _backward(ctx, None, dy), None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor | None, weight: Weight, eps: float) -> tuple[Tensor, Tensor]:
        ctx.backend, ctx.weight, ctx.eps = RMS_NORM.serving(x), weight, eps
        ctx.set_materialize_grads(False)  # nothing reads the last layer's sum: its gradient is None, not zeros
        total, out, rstd = ctx.backend.functions["forward"](x, delta, weight.data, eps, True)
        ctx.has_delta = delta is not None
        ctx.save_for_backward(total, rstd)
        return total if ctx.has_delta else total.view_as(total), out

    @staticmethod
    def backward(ctx: Any, d_sum: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        d = d_sum if dy is None else _backward(ctx, d_sum, dy)
        return d, d if ctx.has_delta else None, None, None


def _backward(ctx: Any, d_sum: Tensor | None, dy: Tensor) -> Tensor:
    x, rstd = ctx.saved_tensors
    d_sum = None if d_sum is None else d_sum.contiguous()
    grad = ctx.weight.grad_buffer()
    return ctx.backend.functions["backward"](dy.contiguous(), d_sum, x, ctx.weight.data, rstd, ctx.eps, grad)


def _forward_cpu(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, save: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    rows, width = x.shape
    total = x if delta is None else empty((rows, width), x.dtype)
    out = empty((rows, width), x.dtype)
    rstd = torch.empty(rows) if save else None
    code, source = dtype_code(x.dtype), (address(x), address(delta), address(weight))
    extension().rms_norm(code, *source, address(total), address(out), address(rstd), rows, width, eps)
    return total, out, rstd


def _backward_cpu(
    dy: Tensor, d_sum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, eps: float, weight_grad: Tensor
) -> Tensor:
    dx = empty(tuple(x.shape), x.dtype)
    inputs = [address(tensor) for tensor in (dy, d_sum, x, weight, rstd)]
    extension().rms_norm_backward(dtype_code(x.dtype), *inputs, address(dx), address(weight_grad), *x.shape)
    return dx


def _forward_torch(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, save: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    total = x if delta is None else x + delta
    return total, rms_norm_reference(total, weight, eps), torch.empty(0) if save else None


def _backward_torch(
    dy: Tensor, d_sum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, eps: float, weight_grad: Tensor
) -> Tensor:
    with torch.enable_grad():
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        dx, dw = torch.autograd.grad(rms_norm_reference(x, weight, eps), (x, weight), dy)
    weight_grad += dw
    return dx if d_sum is None else dx + d_sum


RMS_NORM = Op(
    "rms_norm",
    [
        cpu_backend({"forward": _forward_cpu, "backward": _backward_cpu}, KERNEL_DTYPES),
        triton_backend("rms_norm", "forward", "backward", dtypes=TRITON_DTYPES),
        # torch shares one row's sum among threads when there are few rows
        Backend("torch", {"forward": _forward_torch, "backward": _backward_torch}, exact=False),
    ],
)
