"""Checks between a tensor and the raw address that a kernel gets: whatever passes here cannot make it read astray."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.errors import InputError
from engine.kernels.weight import DTYPES


def dtype_code(dtype: torch.dtype) -> int:
    """The kernels' number for a dtype. Raises InputError for a dtype they do not compute in."""
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype}; the kernels take float32 and bfloat16")
    return DTYPES[dtype]


def check(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """`tensor` itself, if it is contiguous, of this shape (None: any size) and dtype, and on `device`.

    An op is chosen by the device of its first tensor; the others are checked to be on the same one. Raises InputError,
    which names what differs.
    """
    sizes = tuple(tensor.shape)
    if len(sizes) != len(shape) or any(
        want is not None and want != got for want, got in zip(shape, sizes, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise InputError(f"{name} has shape {list(sizes)}; it must be [{wanted}]")
    if dtype is not None and tensor.dtype != dtype:
        raise InputError(f"{name} is {tensor.dtype}; it must be {dtype}")
    if not tensor.is_contiguous():
        raise InputError(f"{name} is not contiguous (strides {tensor.stride()}); pass {name}.contiguous()")
    if device is not None and tensor.device != device:
        raise InputError(
            f"{name} is on {tensor.device}; the call's first tensor is on {device}: pass {name}.to({str(device)!r})"
        )
    return tensor


def address(tensor: Tensor | None) -> int:
    """Where the elements lie, for a C++ kernel; 0 for None. Raises InputError for a tensor of another device."""
    if tensor is None:
        return 0
    if not tensor.is_cpu:
        raise InputError(f"a C++ kernel got a tensor on {tensor.device}; all that it reads lies on the cpu: use .cpu()")
    return tensor.data_ptr()
