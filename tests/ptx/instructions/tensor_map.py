"""Tensor maps: what the copy engine (TMA) is told of a tensor, and the boxes that it copies (PTX ISA, "Tensors").

Dimensions are in the hardware's order, the innermost first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.ptx.instructions.swizzle import WIDTHS, swizzled

_NAN = {2: b"\xff\x7f", 4: b"\xff\xff\xff\x7f"}  # of both 16-bit types and of float32; 8 bits have no fill but zero


@dataclass(frozen=True)
class TensorMap:
    """A tensor of `shape` elements of `element_size` bytes at address `base`, `strides` bytes apart (that of the
    innermost dimension is `element_size`), copied in boxes of `box` elements that lie in shared memory under a swizzle
    of `width` bytes (16: none). What is outside of the tensor reads as 0, or NaN. `tensors` own the memory. Elements
    are never skipped (the element strides of cuTensorMapEncodeTiled are 1, as Triton has them).

    Raises ValueError for what cuTensorMapEncodeTiled refuses.
    """

    base: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_size: int
    width: int = 16
    fill_nan: bool = False
    tensors: tuple[Any, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        rank = len(self.shape)
        inner = self.box[0] * self.element_size if self.box else 0
        rules = {
            "1 to 5 dimensions, as many strides and sides of the box": 1 <= rank <= 5
            and rank == len(self.strides) == len(self.box),
            "an address that 16 divides": self.base % 16 == 0,
            "sides of 1 to 2^32 elements": all(1 <= side <= 2**32 for side in self.shape),
            "strides that 16 divides, below 2^40": all(s % 16 == 0 and 0 <= s < 2**40 for s in self.strides[1:]),
            "elements side by side": self.strides[:1] == (self.element_size,),
            "boxes of 1 to 256 a side": all(1 <= side <= 256 for side in self.box),
            "rows of a box that 16 bytes divide": inner % 16 == 0,
            "a swizzle of 16 (none), 32, 64 or 128 bytes": self.width in WIDTHS,
            "rows of a box no longer than its swizzle": self.width == 16 or inner <= self.width,
            "elements of 1, 2, 4 or 8 bytes": self.element_size in (1, 2, 4, 8),
            "a fill of NaN for 2 or 4 bytes only": not self.fill_nan or self.element_size in _NAN,
        }
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(f"a tensor map needs {rule}; this is {self!r}")
        if self.width != 16 and inner != self.width:
            raise ValueError(f"rows of {inner} bytes under a swizzle of {self.width} are not modelled")

    @staticmethod
    def of(descriptor: Any, metadata: dict[str, Any]) -> TensorMap:
        """From a host tensor descriptor of Triton or Gluon and what the compiler says of it (an element of the compiled
        kernel's `tensordesc_meta`), as Triton's launcher makes it: outermost dimension first there, innermost here."""
        size = metadata["elem_size"]
        return TensorMap(
            descriptor.base.data_ptr(),
            tuple(int(side) for side in reversed(descriptor.shape)),
            tuple(int(stride) * size for stride in reversed(descriptor.strides)),
            tuple(int(side) for side in reversed(metadata["block_size"])),
            size,
            16 << metadata["swizzle"],
            descriptor.padding == "nan",
            (descriptor.base,),
        )

    @property
    def bytes_in_box(self) -> int:
        return int(np.prod(self.box)) * self.element_size

    @property
    def extent(self) -> int:
        """Bytes from the first element's start to the last one's end."""
        ends = ((side - 1) * stride for side, stride in zip(self.shape, self.strides, strict=True))
        return sum(ends) + self.element_size

    def _inside(self, tensor: np.ndarray, start: Sequence[int]) -> tuple[np.ndarray, tuple[slice, ...]]:
        """The box's part that lies in the tensor, and where in the box that is (outermost dimension first)."""
        view = np.lib.stride_tricks.as_strided(
            tensor, (*self.shape[::-1], self.element_size), (*self.strides[::-1], 1), writeable=tensor.flags.writeable
        )
        source, target = [], []
        for first, side, limit in zip(start, self.box, self.shape, strict=True):
            low, high = min(max(first, 0), limit), min(max(first + side, 0), limit)
            source.append(slice(low, high))
            target.append(slice(low - first, high - first) if low < high else slice(0, 0))
        return view[tuple(source[::-1])], tuple(target[::-1])

    def places(self, address: int) -> np.ndarray:
        """Indices of the 16-byte pieces of shared memory that a box at `address` takes, in the order of its bytes.

        Raises ValueError where 128 does not divide the address.
        """
        if address % 128:
            raise ValueError(f"a box at {address} of shared memory: 128 has to divide its address")
        return swizzled(address + 16 * np.arange(self.bytes_in_box // 16), self.width) >> 4

    def load(self, view: Callable[[int, int], np.ndarray], start: Sequence[int]) -> np.ndarray:
        """The bytes of the box whose first element is `start` (signed, innermost first); `view(address, bytes)` is the
        tensor's memory."""
        box = np.zeros((*self.box[::-1], self.element_size), np.uint8)
        if self.fill_nan:
            box[:] = np.frombuffer(_NAN[self.element_size], np.uint8)
        inside, place = self._inside(view(self.base, self.extent), start)
        box[place] = inside
        return box.reshape(-1)

    def store(self, view: Callable[[int, int], np.ndarray], start: Sequence[int], data: np.ndarray) -> None:
        """Writes the bytes of a box to the tensor; what is outside of it is left out."""
        inside, place = self._inside(view(self.base, self.extent), start)
        inside[...] = data.reshape(*self.box[::-1], self.element_size)[place]


def expanded(arguments: Iterable[Any], metadata: Iterable[dict[str, Any]]) -> list[Any]:
    """The parameters of a compiled kernel for the arguments of its launch: a host tensor descriptor becomes its tensor
    map, the sides of its tensor and their strides. `metadata` is the kernel's `tensordesc_meta`."""
    how, found = iter(metadata), []
    for argument in arguments:
        if hasattr(argument, "block_shape"):
            found += [TensorMap.of(argument, next(how)), *argument.shape, *argument.strides]
        else:
            found.append(argument)
    return found
