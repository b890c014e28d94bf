"""AdamW and the squared norm on a GPU: one pass over memory each."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.adamw import Settings
from engine.kernels.triton.launch import launch
from engine.kernels.weight import Weight

_BLOCK = 1024  # elements of a program of the step: 8 for each of 128 threads
_CHUNK = 16384  # elements whose squares one program sums
_FOLD = 1024  # of the chunks' sums at a time


def step(weight: Weight, master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, settings: Settings) -> None:
    """See `engine.kernels.adamw.adamw_`."""
    tensors = (weight.grad_buffer(), master, exp_avg, exp_avg_sq, weight.data)
    rate, beta1, beta2, eps, decay, grad_scale, step = settings
    factors = (
        grad_scale,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        eps,
        1.0 - rate * decay,
        rate / (1.0 - beta1**step),
        1.0 / math.sqrt(1.0 - beta2**step),
    )  # worked out in float64 and rounded to float32 once
    count = master.numel()
    launch(_step, (triton.cdiv(count, _BLOCK),), *tensors, count, *factors, BLOCK=_BLOCK)


def squared_norm(tensor: Tensor) -> Tensor:
    """Sum of the squares, float64 [1]: chunks of 16,384 elements, and these in order."""
    chunks = triton.cdiv(tensor.numel(), _CHUNK)
    partial = torch.empty(chunks, dtype=torch.float64, device=tensor.device)
    total = torch.zeros(1, dtype=torch.float64, device=tensor.device)
    launch(_square, (chunks,), tensor, partial, tensor.numel(), CHUNK=_CHUNK, BLOCK=_BLOCK)
    launch(_fold, (min(1, chunks),), partial, total, chunks, FOLD=_FOLD)
    return total


@triton.jit
def _step(
    grad, master, exp_avg, exp_avg_sq, weight, count,
    grad_scale, rest1, beta2, rest2, eps, decay, step_size, root_correction, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(grad + at, mask=inside, other=0.0) * grad_scale
    m = tl.load(exp_avg + at, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
    w = tl.load(master + at, mask=inside, other=0.0)
    m += rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    w = w * decay - tl.div_rn(step_size * m, tl.sqrt_rn(v) * root_correction + eps)
    tl.store(exp_avg + at, m, mask=inside)
    tl.store(exp_avg_sq + at, v, mask=inside)
    tl.store(master + at, w, mask=inside)
    tl.store(weight + at, w.to(weight.dtype.element_ty), mask=inside)


@triton.jit
def _square(tensor, partial, count, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    chunk = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, CHUNK, BLOCK):
        at = chunk * CHUNK + first + tl.arange(0, BLOCK)
        value = tl.load(tensor + at, mask=at < count, other=0.0).to(tl.float64)
        total += value * value
    tl.store(partial + chunk, tl.sum(total, axis=0))


@triton.jit
def _fold(partial, total, count, FOLD: tl.constexpr):
    sums = tl.zeros([FOLD], tl.float64)
    for first in range(0, count, FOLD):
        at = first + tl.arange(0, FOLD)
        sums += tl.load(partial + at, mask=at < count, other=0.0)
    tl.store(total, tl.sum(sums, axis=0))
