"""What kernels for Hopper need of Gluon, by one name whatever the release of Triton is (3.6 or newer)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import _unwrap_if_constexpr, builtin
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@builtin
def reshaped(memory: Any, shape: Any, layout: Any, _semantic: Any = None) -> Any:
    """The same shared memory as an array of another shape and layout."""
    sizes = [int(_unwrap_if_constexpr(size)) for size in _unwrap_if_constexpr(shape)]
    return _semantic.memdesc_reinterpret(memory, memory.dtype, sizes, _unwrap_if_constexpr(layout))


def tensor_map(tensor: Tensor, box: Sequence[int]) -> TensorDescriptor:
    """How the copy engine (TMA) takes boxes of a tensor into shared memory: 16-bit ones into rows of 128 bytes, which
    wgmma reads, others without a swizzle. What lies outside the tensor is 0. `box` has as many sides as the tensor;
    in 16 bits the last is 64 or 128. The last stride is 1, others are multiples of 16 bytes, as is the address.
    """
    layout = _layout(8 * tensor.element_size(), len(box))
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(box), layout)


@cache
def _layout(bits: int, rank: int) -> gl.NVMMASharedLayout:
    """Made once: a launch makes several maps."""
    return gl.NVMMASharedLayout(128 if bits == 16 else 0, bits, rank=rank)
