"""Memory as instructions see it: regions of bytes, gathered and scattered with every access checked."""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.ptx.syntax import PTXError

# Where shared memory and parameters begin in generic space; global memory has its own addresses there.
SHARED_WINDOW, PARAMETER_WINDOW = 1 << 60, 1 << 61
# 16 bytes are copied, never added.
_ITEMS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


class Region:
    """`size` bytes at address `base`; `views[n]` is the same memory in items of n bytes, from `base` (a multiple of 16)
    on. Items beyond `limit` are not the region's: `limit` and `first` are what may be touched."""

    def __init__(self, data: NDArray[np.uint8], base: int, first: int, limit: int) -> None:
        self.bytes, self.base, self.first, self.limit = data, base, first, limit
        self.views = {n: data[: len(data) // n * n].view(item) for n, item in _ITEMS.items()}
        self.origin = np.uint64(base)

    @staticmethod
    def at(first: int, limit: int) -> Region:
        """Memory of this process. Bytes around it are seen where alignment wants it, and never touched."""
        base, end = first & ~15, -(-limit // 16) * 16
        array = (ctypes.c_uint8 * (end - base)).from_address(base)
        return Region(np.frombuffer(memoryview(array), np.uint8), base, first, limit)


class Space:
    """Disjoint regions in order. Loads and stores raise PTXError where an address lies in none of them, or is not a
    multiple of the item's size."""

    def __init__(self, name: str, regions: list[Region]) -> None:
        self.name = name
        self.regions = sorted(regions, key=lambda region: region.first)
        self._firsts = [region.first for region in self.regions]

    def region(self, address: int) -> Region:
        place = bisect_right(self._firsts, address) - 1
        if place < 0 or address >= self.regions[place].limit:
            where = ", ".join(f"[{r.first:#x}, {r.limit:#x})" for r in self.regions)
            raise PTXError(f"{self.name} address {address:#x} is in none of {where}")
        return self.regions[place]

    def bytes(self, address: int, size: int) -> NDArray[np.uint8]:
        """The memory of `size` bytes from `address` on, to read and write."""
        region = self.region(address)
        if address + size > region.limit:
            raise PTXError(f"{self.name} [{address:#x}, {address + size:#x}) ends beyond {region.limit:#x}")
        return region.bytes[address - region.base : address - region.base + size]

    def _places(self, addresses: NDArray[np.uint64], size: int) -> tuple[Region, NDArray[np.int64]] | None:
        """The region of all of them and the items in its view; None where they are of several regions."""
        region = self.region(int(addresses[0]))
        offsets = addresses - region.origin
        union = int(np.bitwise_or.reduce(offsets))  # no offset is greater, and its low bits are those of all
        if union & (size - 1):
            wrong = int(addresses[(offsets & np.uint64(size - 1)) != 0][0])
            raise PTXError(f"{self.name} address {wrong:#x} is no multiple of {size}")
        low = region.first - region.base
        end = region.limit - region.base
        may_be_outside = union + size > end or low
        if may_be_outside and (int(offsets.max()) + size > end or int(offsets.min()) < low):
            return None
        return region, offsets.view(np.int64) // size if size > 1 else offsets.view(np.int64)

    def _by_region(self, addresses: NDArray[np.uint64], size: int) -> list[NDArray[np.intp]]:
        """The places of those in one region, for each region. Raises where one is in none, or reaches beyond it."""
        owner = np.searchsorted(np.array(self._firsts, np.uint64), addresses, side="right") - 1
        limits = np.array([region.limit for region in self.regions], np.uint64)
        wrong = (owner < 0) | (addresses + np.uint64(size) > limits[owner])
        if wrong.any():
            address = int(addresses[wrong][0])
            region = self.region(address)
            raise PTXError(f"{self.name} [{address:#x}, {address + size:#x}) ends beyond {region.limit:#x}")
        return [np.flatnonzero(owner == each) for each in np.unique(owner)]

    def load(self, addresses: NDArray[np.uint64], size: int) -> NDArray:
        """Items of `size` bytes (16: as complex128)."""
        found = self._places(addresses, size)
        if found:
            return found[0].views[size].take(found[1])
        values = np.empty(len(addresses), _ITEMS[size])
        for places in self._by_region(addresses, size):
            values[places] = self.load(addresses[places], size)
        return values

    def store(self, addresses: NDArray[np.uint64], size: int, values: NDArray) -> None:
        """`values` are items of `size` bytes, one for each address."""
        found = self._places(addresses, size)
        if found:
            found[0].views[size][found[1]] = values
            return
        for places in self._by_region(addresses, size):
            self.store(addresses[places], size, values[places])


def of_tensors(tensors: list[torch.Tensor]) -> Space:
    """The global memory that these tensors make up: from the first element of each to its last, and nothing else."""
    spans = []
    for tensor in tensors:
        if tensor.numel() == 0:
            continue
        first = tensor.data_ptr()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        spans.append((first, first + (last + 1) * tensor.element_size()))
    regions: list[tuple[int, int]] = []
    for first, limit in sorted(spans):
        if regions and first <= regions[-1][1] and first < regions[-1][1]:
            regions[-1] = (regions[-1][0], max(limit, regions[-1][1]))
        else:
            regions.append((first, limit))
    return Space("global", [Region.at(*region) for region in regions])
