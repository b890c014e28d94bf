"""Record a forward once, replay it for any number of rows: no Python per layer, no allocation per layer.

On a CPU the recording is a list of kernel calls (csrc/graph.h); a GPU has CUDA graphs. Tensors made while a graph
records come from the graph's own pool: a block is used again once nothing refers to it, as liveness goes in eager mode,
so a recorded forward needs the memory of its widest moment only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.op import extension

_recording: Graph | None = None


class Graph:
    """`with graph.record(): forward(...)` notes the kernel calls down; `replay(rows)` runs them."""

    def __init__(self) -> None:
        self._calls = extension().Graph()
        self._blocks: list[Tensor] = []

    def __enter__(self) -> Graph:
        global _recording
        self._calls.begin()
        _recording = self
        return self

    def __exit__(self, *_: object) -> None:
        global _recording
        _recording = None
        self._calls.end()

    def replay(self, rows: int) -> None:
        """Runs every recorded kernel on the first `rows` rows of its tensors."""
        self._calls.replay(rows)

    def __len__(self) -> int:
        return len(self._calls)

    def nbytes(self) -> int:
        """Bytes of the pool."""
        return sum(block.numel() for block in self._blocks)

    def _empty(self, num_bytes: int) -> Tensor:
        free = [b for b in self._blocks if b.numel() >= num_bytes and _references(b) == 1]
        if free:
            return min(free, key=Tensor.numel)
        block = torch.empty(num_bytes, dtype=torch.uint8)
        self._blocks.append(block)
        return block


def _references(block: Tensor) -> int:
    """How many tensors share the block's storage."""
    return torch._C._storage_Use_Count(block.untyped_storage()._cdata) - 1  # less the storage object made just now


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """An uninitialised tensor; while a graph records, one whose memory stays valid for every replay."""
    if _recording is None:
        return torch.empty(shape, dtype=dtype, device=device)
    count = 1
    for size in shape:
        count *= size
    num_bytes = count * dtype.itemsize
    return _recording._empty(max(64, num_bytes))[:num_bytes].view(dtype).view(shape)
