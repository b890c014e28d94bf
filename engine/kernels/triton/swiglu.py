"""SwiGLU on a GPU: one program per row and block of columns.

# T tokens, I feed-forward width
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.graph import empty
from engine.kernels.triton.launch import launch

_BLOCK = 1024  # columns of a program: 8 elements for each of 128 threads, 16 bytes of bf16


def forward(gate_up: Tensor) -> Tensor:
    """See `engine.kernels.swiglu.swiglu`."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = empty((rows, width), gate_up.dtype, gate_up.device)
    launch(_forward, (rows, triton.cdiv(width, _BLOCK)), gate_up, out, width, BLOCK=_BLOCK)
    return out


def backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of gate_up [T, 2 I] from that of the output [T, I]."""
    rows, width = dy.shape
    grad = empty(tuple(gate_up.shape), gate_up.dtype, gate_up.device)
    launch(_backward, (rows, triton.cdiv(width, _BLOCK)), dy, gate_up, grad, width, BLOCK=_BLOCK)
    return grad


@triton.jit
def _forward(gate_up, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=inside, other=0.0)
    up = tl.load(gate_up + (row * 2 + 1) * width + columns, mask=inside, other=0.0)
    silu = (gate.to(tl.float32) * _sigmoid(gate.to(tl.float32))).to(gate.dtype)
    product = silu.to(tl.float32) * up.to(tl.float32)
    tl.store(out + row * width + columns, product.to(gate.dtype), mask=inside)


@triton.jit
def _backward(dy, gate_up, grad, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate_at = row * 2 * width + columns
    gate = tl.load(gate_up + gate_at, mask=inside, other=0.0)
    up = tl.load(gate_up + gate_at + width, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    x = gate.to(tl.float32)
    sigmoid = _sigmoid(x)
    silu = (x * sigmoid).to(gate.dtype).to(tl.float32)
    d_silu = (d * up).to(gate.dtype).to(tl.float32)
    d_gate = d_silu * sigmoid * (1.0 + x * (1.0 - sigmoid))
    tl.store(grad + gate_at, d_gate.to(gate.dtype), mask=inside)
    tl.store(grad + gate_at + width, (d * silu).to(gate.dtype), mask=inside)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))
