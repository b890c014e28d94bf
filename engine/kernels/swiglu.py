"""The elementwise half of a SwiGLU feed-forward layer (arXiv 2002.05202).

# T tokens, I feed-forward width
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from engine.errors import InputError
from engine.kernels.checks import address, check, dtype_code
from engine.kernels.dtypes import KERNEL_DTYPES, TRITON_DTYPES
from engine.kernels.graph import empty
from engine.kernels.op import Backend, Op, cpu_backend, extension, triton_backend


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up with gate the first and up the last I columns: [T, 2 I] -> [T, I] in its dtype.

    silu is computed in float32 (float64 for float64) and rounded to the dtype before the product, as Hugging Face's
    Llama does. Raises InputError for an odd number of columns or a tensor that is not contiguous.
    """
    check("gate_up", gate_up, (None, None))
    if gate_up.shape[1] % 2:
        raise InputError(f"gate_up has {gate_up.shape[1]} columns; it must have an even number: gate, then up")
    if torch.is_grad_enabled() and gate_up.requires_grad:
        return _SwiGLU.apply(gate_up)
    return SWIGLU["forward", gate_up](gate_up)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The definition in plain torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.backend = SWIGLU.serving(gate_up)
        ctx.save_for_backward(gate_up)
        return ctx.backend.functions["forward"](gate_up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        return ctx.backend.functions["backward"](dy.contiguous(), *ctx.saved_tensors)


def _forward_cpu(gate_up: Tensor) -> Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = empty((rows, width), gate_up.dtype)
    extension().swiglu(dtype_code(gate_up.dtype), address(gate_up), address(out), rows, width)
    return out


def _backward_cpu(dy: Tensor, gate_up: Tensor) -> Tensor:
    grad = empty(tuple(gate_up.shape), gate_up.dtype)
    code = dtype_code(gate_up.dtype)
    extension().swiglu_backward(code, address(dy), address(gate_up), address(grad), *dy.shape)
    return grad


def _backward_torch(dy: Tensor, gate_up: Tensor) -> Tensor:
    with torch.enable_grad():
        gate_up = gate_up.detach().requires_grad_()
        return torch.autograd.grad(swiglu_reference(gate_up), gate_up, dy)[0]


SWIGLU = Op(
    "swiglu",
    [
        cpu_backend({"forward": _forward_cpu, "backward": _backward_cpu}, KERNEL_DTYPES),
        triton_backend("swiglu", "forward", "backward", dtypes=TRITON_DTYPES),
        # torch's vector and scalar exp differ in the last bit, and where a vector ends depends on the number of rows
        Backend("torch", {"forward": swiglu_reference, "backward": _backward_torch}, exact=False),
    ],
)
