"""AdamW on fp32 master weights, writing the compute weight in place, and the squared norm that clipping needs.

# N rows, K columns of a weight (or N elements of a vector)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.errors import InputError
from engine.kernels.checks import address, check, dtype_code
from engine.kernels.dtypes import KERNEL_DTYPES, TRITON_DTYPES, wide_dtype
from engine.kernels.op import Backend, Op, cpu_backend, extension, triton_backend
from engine.kernels.weight import Weight


class Settings(NamedTuple):
    """What a step takes beside its tensors, in the order of the extension's arguments; `step` is 1 for the first."""

    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    grad_scale: float
    step: int


def adamw_(
    weight: Weight,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
) -> None:
    """One step of AdamW (decoupled weight decay, arXiv 1711.05101) from `weight.grad_buffer()` times `grad_scale`.

    `master`, `exp_avg` and `exp_avg_sq` are float32 (float64 for a float64 weight), dense, of the weight's shape, and
    updated in place; `step` is 1 for the first. The compute weight is written from the new master, rounded to its
    dtype, in its own layout, in the same pass. The gradient is left as it is. Raises InputError for a shape, dtype or
    step that does not fit.
    """
    if step < 1:
        raise InputError(f"step is {step}; the first step is 1")
    for name, tensor in (("master", master), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        check(name, tensor, weight.shape, wide_dtype(weight.dtype), weight.data.device)
    settings = Settings(learning_rate, beta1, beta2, eps, weight_decay, grad_scale, step)
    ADAMW["step", weight.data](weight, master, exp_avg, exp_avg_sq, settings)


def squared_norm(tensor: Tensor) -> float:
    """Sum of the squares of a contiguous float32 or float64 tensor, in float64: the same for any number of threads."""
    return squared_norms([tensor])[0]


def squared_norms(tensors: Sequence[Tensor]) -> list[float]:
    """`squared_norm` of each, tensors of one device; a GPU is waited for once."""
    for tensor in tensors:
        check("tensor", tensor, (None,) * tensor.dim(), wide_dtype(tensor.dtype), tensors[0].device)
    sums = [ADAMW["squared_norm", tensor](tensor) for tensor in tensors]
    return torch.cat(sums).tolist() if sums else []


def _step_cpu(weight: Weight, master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, settings: Settings) -> None:
    rows, width = weight.shape if len(weight.shape) == 2 else (1, weight.shape[0])
    tensors = (weight.grad_buffer(), master, exp_avg, exp_avg_sq, weight.data)
    code = dtype_code(weight.dtype)
    extension().adamw(code, weight.packed, *settings, *(address(t) for t in tensors), rows, width)


def _squared_norm_cpu(tensor: Tensor) -> Tensor:
    return torch.tensor([extension().squared_norm(address(tensor), tensor.numel())], dtype=torch.float64)


def _step_torch(weight: Weight, master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, settings: Settings) -> None:
    rate, beta1, beta2, eps, decay, grad_scale, step = settings
    grad = weight.grad_buffer() * grad_scale
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step)
    master.mul_(1 - rate * decay)
    master.addcdiv_(exp_avg, root + eps, value=-rate / (1 - beta1**step))
    weight.load_(master)


def _squared_norm_torch(tensor: Tensor) -> Tensor:
    return tensor.double().pow(2).sum()[None]


ADAMW = Op(
    "adamw",
    [
        cpu_backend({"step": _step_cpu, "squared_norm": _squared_norm_cpu}, KERNEL_DTYPES),
        triton_backend("adamw", "step", "squared_norm", dtypes=TRITON_DTYPES),
        Backend("torch", {"step": _step_torch, "squared_norm": _squared_norm_torch}),
    ],
)
