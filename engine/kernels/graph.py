"""Record a forward once, replay it for any number of rows: no Python per layer, no allocation per layer.

On a CPU the recording is a list of kernel calls (csrc/graph.h); a GPU has CUDA graphs. Tensors made while a graph
records come from the graph's own pool: a block is used again once nothing refers to it, as liveness goes in eager mode,
so a recorded forward needs the memory of its widest moment only.

What is no kernel (a collective, say) takes part as a host call: a Python function that runs between two kernels.
"""

from __future__ import annotations

from collections.abc import Callable

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
        self._functions: list[Callable[[int], object]] = []  # of the host calls; the extension only borrows them
        self.pool = Pool()

    def __enter__(self) -> Graph:
        global _recording
        self._calls.begin()
        self._functions.clear()
        _recording = self
        return self

    def __exit__(self, *_: object) -> None:
        global _recording
        _recording = None
        self._calls.end()

    def replay(self, rows: int) -> None:
        """Runs every recorded kernel on the first `rows` rows of its tensors, and calls each host call with `rows`.

        What a host call raises ends the replay and is raised here; the graph can be replayed again.
        """
        self._calls.replay(rows)

    def add_host_call(self, function: Callable[[int], object]) -> None:
        """Notes `function` down after what has been recorded so far."""
        self._calls.host_call(function)
        self._functions.append(function)

    def __len__(self) -> int:
        return len(self._calls)


class Recorded:
    """`forward(rows)`, which reads its input from buffers of `max_rows` rows that stay where they are, recorded at the
    first call with all of them. What a call returns is good until the next one."""

    def __init__(self, forward: Callable[[int], Tensor], max_rows: int) -> None:
        self.max_rows = max_rows
        self._forward = forward
        self.graph: Graph | None = None
        self._out: Tensor | None = None

    def __call__(self, rows: int) -> Tensor:
        if self.graph is None or self._out is None:
            with Graph() as graph:
                self._out = self._forward(self.max_rows)
            self.graph = graph
        self.graph.replay(rows)
        return self._out[:rows]


def host_call(function: Callable[[int], object], rows: int) -> None:
    """Calls function(rows) between the kernels around it: at once, or at each replay while a graph records.

    A recorded function gets the rows of the replay, at most `rows`. It reads and writes tensors that live as long as
    the graph does: made before, or with `empty` while it records, and held by the function.
    """
    if _recording is not None:
        _recording.add_host_call(function)
    else:
        function(rows)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """An uninitialised tensor: while a graph records, one whose memory stays valid for every replay; a big one outside
    of graphs, memory that an earlier tensor had. On a GPU torch's own allocator does both."""
    if device == "cpu" or torch.device(device).type == "cpu":
        if _recording is not None:
            return _recording.pool.take(shape, dtype)
        if num_bytes(shape, dtype) >= POOLED_BYTES:
            return _shared.take(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=device)
