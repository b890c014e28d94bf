"""Memory of tensors that live long, on any device; on a CPU, huge pages where it pays, and blocks that are used again
instead of given back.

A fresh page costs a fault and a zeroing by the kernel, and 4 KiB pages a TLB miss each 64 lines: together a tenth of
a training step. numpy asks Linux for 2 MiB pages for arrays of 4 MiB and more, so big buffers are numpy's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: a cache line, a 512-bit register, a row of a matrix tile
POOLED_BYTES = 1 << 18  # smaller buffers are malloc's own business
CPU = torch.device("cpu")


def allocate(num_bytes: int, device: torch.device | None = None) -> Tensor:
    """uint8 [num_bytes] on `device` (None: torch's default one, that of the `with torch.device(...)` around), aligned
    to 64 bytes; reads as zeros. On a CPU it takes physical memory only where it is touched; on "meta" it has a size but
    no memory at all: a model of any size can be laid out.
    """
    device = device or torch.get_default_device()
    if device.type != "cpu":
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    raw = torch.from_numpy(np.zeros(num_bytes + ALIGNMENT, dtype=np.uint8))
    start = -raw.data_ptr() % ALIGNMENT
    return raw[start : start + num_bytes]


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Zeros on `device` (None: torch's default one), on a CPU not touched before they are used."""
    return shaped(allocate(num_bytes(shape, dtype), device), shape, dtype)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`: itself where that is the CPU, else a copy that the host does not wait for, by way of
    page-locked memory, which torch keeps until the copy is over."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def read_vectors(vectors: Sequence[Tensor]) -> list[Tensor]:
    """Vectors of one length on the CPU, without their gradients: themselves where they lie there, else copies, for
    which a GPU is waited for once."""
    if vectors[0].is_cpu:
        return [vector.detach() for vector in vectors]
    together = torch.stack([vector.detach().double() for vector in vectors]).cpu()  # which holds the others exactly
    return [row.to(vector.dtype) for row, vector in zip(together, vectors, strict=True)]


def num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    count = dtype.itemsize
    for size in shape:
        count *= size
    return count


def shaped(block: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The beginning of a block as a tensor."""
    return block[: num_bytes(shape, dtype)].view(dtype).view(shape)


def unowned(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory without a reference to it: for a recorded call, whose graph keeps the pool that the
    block came from but lets others use it when the recording is past it. Only recordings of a CPU have such calls:
    elsewhere it is the tensor itself."""
    if tensor.device.type != "cpu":
        return tensor
    size = tensor.numel() * tensor.element_size()
    raw = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(tensor.data_ptr()))
    return torch.from_numpy(raw).view(tensor.dtype).view(tensor.shape)


class Pool:
    """Blocks on the CPU, by size. A block is free when no tensor but the pool's own refers to its storage, so a tensor
    taken from a pool needs no giving back, and views of it keep it."""

    def __init__(self) -> None:
        self._blocks: dict[int, list[tuple[Tensor, int]]] = {}

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        size = _rounded(num_bytes(shape, dtype))
        blocks = self._blocks.setdefault(size, [])
        for block, idle_references in blocks:
            if _references(block) == idle_references:
                return shaped(block, shape, dtype)
        block = allocate(size, CPU)
        blocks.append((block, _references(block)))
        return shaped(block, shape, dtype)

    @property
    def nbytes(self) -> int:
        return sum(size * len(blocks) for size, blocks in self._blocks.items())

    def clear(self) -> None:
        """Gives free blocks back to the system; those in use go when their last tensor does."""
        self._blocks.clear()


def _references(block: Tensor) -> int:
    """How many tensors share the block's storage (and one more, for asking)."""
    return torch._C._storage_Use_Count(block.untyped_storage()._cdata)


def _rounded(size: int) -> int:
    """Up to the next of four steps per power of two, so that like sizes share blocks and at most a fifth is waste."""
    step = max(ALIGNMENT, 1 << max(0, size.bit_length() - 3))
    return -(-size // step) * step
