"""y = x W^T + b, and its three gradients. The C++ kernels read packed weights, the others dense ones.

# T tokens, N columns of the output, K width of the input
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from engine.errors import InputError
from engine.kernels.dtypes import TRITON_DTYPES, wide, wide_dtype
from engine.kernels.graph import empty
from engine.kernels.op import Backend, Op, cpu_backend, extension, triton_backend
from engine.kernels.weight import DTYPES, Weight


def linear(x: Tensor, weight: Weight, bias: Weight | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """y = x W^T + b, [T, K] -> [T, N]: summed in fp32, the bias added, rounded once to `out_dtype` (x's by default).

    `x` has the weight's dtype; its rows may lie apart (stride(0) >= K) but not their elements. A row of y has the same
    bits whatever T is and wherever in x the row stands. Under grad, the backward returns dx and adds dW and db to
    `weight.grad_buffer()` and `bias.grad_buffer()`. float64 is summed in float64, in the gradients too. Raises
    InputError for shapes or dtypes that do not match.
    """
    _check(x, weight, "x", weight.shape[-1])
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"bias {bias.name} is {bias.shape}; weight {weight.name} {weight.shape} needs one per row")
    out_dtype = out_dtype or x.dtype
    if out_dtype not in DTYPES and out_dtype != x.dtype:
        raise InputError(f"linear cannot write {out_dtype} from {x.dtype}; it writes torch.float32 and torch.bfloat16")
    if torch.is_grad_enabled() and x.requires_grad:
        return _Linear.apply(x, weight, bias, out_dtype)
    return OP["forward", x](_rows(x), weight, bias, out_dtype)


def linear_grad_input(dy: Tensor, weight: Weight) -> Tensor:
    """dx = dy W, [T, N] -> [T, K], in the weight's dtype, to which dy is rounded first.

    Raises InputError for shapes that do not match.
    """
    dy = dy.to(weight.dtype)
    _check(dy, weight, "dy", weight.shape[0])
    return OP["grad_input", dy](_rows(dy), weight)


def linear_grad_weight_(dy: Tensor, x: Tensor, weight: Weight) -> None:
    """`weight.grad_buffer()` += dy^T x, for dy [T, N], rounded to the weight's dtype first, and x [T, K]; fp32 sums.

    Inside `deferred_weight_gradients` it is queued instead. Raises InputError for shapes or dtypes that do not match.
    """
    dy = dy.to(weight.dtype)
    _check(dy, weight, "dy", weight.shape[0])
    _check(x, weight, "x", weight.shape[1])
    if dy.shape[0] != x.shape[0]:
        raise InputError(f"dy has {dy.shape[0]} rows and x has {x.shape[0]}; they are of the same tokens")
    if _deferred is not None:
        _deferred.add(_rows(dy), _rows(x), weight)
    else:
        OP["grad_weight_", dy](_rows(dy), _rows(x), weight)


class WeightGradients:
    """Weight gradients that wait, in the order in which they were asked for. Each keeps its dy and x alive."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Tensor, Weight]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, dy: Tensor, x: Tensor, weight: Weight) -> None:
        """dy [T, N] and x [T, K] must not change until `run`."""
        self._waiting.append((dy, x, weight))

    def run(self) -> None:
        """Adds them to their buffers, oldest first, and lets go of them."""
        waiting, self._waiting = self._waiting, []
        for dy, x, weight in waiting:
            OP["grad_weight_", dy](dy, x, weight)


_deferred: WeightGradients | None = None


@contextmanager
def deferred_weight_gradients() -> Iterator[WeightGradients]:
    """Backwards inside this block compute gradients of activations, norms and biases, and queue those of matrices.

    The queue's `run` adds them later, in the order of the backwards, and therefore with the same bits. A zero-bubble
    pipeline (arXiv 2401.10241) fills idle time with them.
    """
    global _deferred
    before, _deferred = _deferred, WeightGradients()
    try:
        yield _deferred
    finally:
        _deferred = before


def weight_gradients_wait() -> bool:
    """Whether this is inside `deferred_weight_gradients`."""
    return _deferred is not None


def linear_grad_bias_(dy: Tensor, bias: Weight) -> None:
    """`bias.grad_buffer()` += the sum of dy's rows, [T, N] -> [N], in fp32, token by token."""
    if dy.dim() != 2 or dy.shape[1:] != bias.shape:
        raise InputError(f"dy is {tuple(dy.shape)}; bias {bias.name} {bias.shape} needs one column per element")
    OP["grad_bias_", bias.data](_rows(dy), bias)


class _Linear(torch.autograd.Function):
    """Autograd carries activations only: gradients of weights go straight to their buffers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, bias: Weight | None, out_dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias = weight, bias
        return OP["forward", x](_rows(x), weight, bias, out_dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        if ctx.bias is not None:
            linear_grad_bias_(dy, ctx.bias)
        linear_grad_weight_(dy, x, ctx.weight)
        return linear_grad_input(dy, ctx.weight), None, None, None


def _rows(x: Tensor) -> Tensor:
    """x itself where each row is contiguous and rows do not overlap, else a contiguous copy."""
    regular = x.stride(1) == 1 and (x.stride(0) >= x.shape[1] or x.shape[0] <= 1)
    return x.detach() if regular else x.detach().contiguous()


def _check(x: Tensor, weight: Weight, what: str, width: int) -> None:
    if len(weight.shape) != 2:
        raise InputError(f"weight {weight.name} is {weight.shape}; linear needs a matrix [N, K]")
    if x.dim() != 2 or x.shape[1] != width:
        raise InputError(f"{what} is {tuple(x.shape)}; weight {weight.name} {weight.shape} needs [T, {width}]")
    if x.dtype != weight.dtype:
        raise InputError(f"{what} is {x.dtype} and weight {weight.name} {weight.dtype}; they must be the same")
    if x.device != weight.data.device:
        raise InputError(f"{what} is on {x.device} and weight {weight.name} on {weight.data.device}; move one of them")


# ---- the definition, in torch ----


def _torch_forward(x: Tensor, weight: Weight, bias: Weight | None, out_dtype: torch.dtype) -> Tensor:
    """On rows padded to a multiple of 16: torch takes other kernels for a few rows (measured in fp32: up to 11)."""
    num_rows = x.shape[0]
    padded = torch.nn.functional.pad(wide(x), (0, 0, 0, -num_rows % 16))
    y = padded @ weight.dense(dtype=padded.dtype).T
    if bias is not None:
        y = y + bias.dense(dtype=y.dtype)
    return y[:num_rows].to(out_dtype)


def _torch_grad_input(dy: Tensor, weight: Weight) -> Tensor:
    return (wide(dy) @ weight.dense(dtype=wide_dtype(dy.dtype))).to(weight.dtype)


def _torch_grad_weight_(dy: Tensor, x: Tensor, weight: Weight) -> None:
    weight.grad_buffer().addmm_(wide(dy).T, wide(x))


def _torch_grad_bias_(dy: Tensor, bias: Weight) -> None:
    bias.grad_buffer().add_(wide(dy).sum(0))


# ---- C++: csrc/cpu/linear.inl ----


def _cpu_forward(x: Tensor, weight: Weight, bias: Weight | None, out_dtype: torch.dtype) -> Tensor:
    (num_rows, width), columns = x.shape, weight.shape[0]
    y = empty((num_rows, columns), out_dtype)
    extension().linear(
        num_rows, columns, width, DTYPES[x.dtype], x.data_ptr(), x.stride(0), _packed(weight),
        0 if bias is None else bias.data.data_ptr(), DTYPES[x.dtype if bias is None else bias.dtype],
        y.data_ptr(), DTYPES[out_dtype],
    )  # fmt: skip
    return y


def _cpu_grad_input(dy: Tensor, weight: Weight) -> Tensor:
    columns, width = weight.shape
    dx = empty((dy.shape[0], width), weight.dtype)
    extension().linear_grad_input(
        dy.shape[0], columns, width, DTYPES[dy.dtype], dy.data_ptr(), dy.stride(0), _packed(weight), dx.data_ptr()
    )
    return dx


def _cpu_grad_weight_(dy: Tensor, x: Tensor, weight: Weight) -> None:
    columns, width = weight.shape
    extension().linear_grad_weight(
        dy.shape[0], columns, width, DTYPES[dy.dtype], dy.data_ptr(), dy.stride(0), x.data_ptr(), x.stride(0),
        weight.grad_buffer().data_ptr(),
    )  # fmt: skip


def _cpu_grad_bias_(dy: Tensor, bias: Weight) -> None:
    if dy.dtype not in DTYPES:
        dy = dy.float()
    extension().linear_grad_bias(
        dy.shape[0], dy.shape[1], DTYPES[dy.dtype], dy.data_ptr(), dy.stride(0), bias.grad_buffer().data_ptr()
    )


def _packed(weight: Weight) -> int:
    if not weight.packed:
        raise InputError(f"weight {weight.name} is stored dense; a matrix that linear reads is made with packed=True")
    return weight.data.data_ptr()


OP = Op(
    "linear",
    [
        cpu_backend(
            {
                "forward": _cpu_forward,
                "grad_input": _cpu_grad_input,
                "grad_weight_": _cpu_grad_weight_,
                "grad_bias_": _cpu_grad_bias_,
            },
            DTYPES,
        ),
        triton_backend("linear", "forward", "grad_input", "grad_weight_", "grad_bias_", dtypes=TRITON_DTYPES),
        Backend(
            "torch",
            {
                "forward": _torch_forward,
                "grad_input": _torch_grad_input,
                "grad_weight_": _torch_grad_weight_,
                "grad_bias_": _torch_grad_bias_,
            },
            exact=False,
        ),
    ],
)
