"""Record a forward once, replay it for any number of rows: no Python per layer, no allocation per layer.

On a CPU the recording is a list of kernel calls (csrc/graph.h); a GPU has CUDA graphs. Tensors made while a graph
records come from the graph's own pool: a block is used again once nothing refers to it, as liveness goes in eager mode,
so a recorded forward needs the memory of its widest moment only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.memory import POOLED_BYTES, Pool, num_bytes
from engine.kernels.op import extension

_recording: Graph | None = None
_shared = Pool()  # activations and gradients outside of graphs


class Graph:
    """`with Graph() as graph: forward(...)` notes the kernel calls down; `graph.replay(rows)` runs them."""

    def __init__(self) -> None:
        self._calls = extension().Graph()
        self.pool = Pool()

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


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """An uninitialised tensor: while a graph records, one whose memory stays valid for every replay; a big one outside
    of graphs, memory that an earlier tensor had."""
    if _recording is not None:
        return _recording.pool.take(shape, dtype)
    if torch.device(device).type == "cpu" and num_bytes(shape, dtype) >= POOLED_BYTES:
        return _shared.take(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=device)
