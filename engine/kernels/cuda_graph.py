"""Forwards of few rows as CUDA graphs: one launch a step instead of one for each kernel.

A CUDA graph replays exactly the rows it was captured with, so there is one for each of a ladder of sizes, and a step
takes the first that is large enough:

    rows of the step   1  2  3  5  9 ...  250
    rows of the graph  1  2  4  8  16 ... 256

The rows past the real ones are computed from whatever the buffers hold, and nobody reads them. Attention reads in
device memory how many rows of its plan are real, and writes no keys and values for the others.

Unproven: no GPU has captured these graphs. Tests show which sizes are captured, in which order, and which one serves.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.kernels.attention_plan import AttentionPlan

MAX_GRAPH_ROWS = 256  # of more rows, the kernels take longer than their launches

Forward = Callable[[int], Tensor]
Captured = tuple[Callable[[], None], Tensor, Any]
Capture = Callable[[Forward, int, Any], Captured]


def ladder(max_rows: int) -> list[int]:
    """The sizes of the graphs, ascending: 1, 2, 4, then multiples of 8, the last one `max_rows` or MAX_GRAPH_ROWS."""
    last = min(max_rows, MAX_GRAPH_ROWS)
    return [size for size in (1, 2, 4, *range(8, last, 8)) if size < last] + [last]


def capture(forward: Forward, rows: int, pool: Any) -> Captured:
    """Captures `forward(rows)` in the memory `pool` (None: one of its own). Returns what replays it, its output, which
    lies where each replay writes it, and the pool."""
    forward(rows)  # compiles and loads kernels, which a capture must not do
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # a saver's thread may copy meanwhile
        out = forward(rows)
    return graph.replay, out, graph.pool()


class CudaGraphs:
    """`forward(rows)` of the batch that `plan` holds, from graphs of up to `max_rows` rows. They are captured at the
    first call, the largest first, so that the others find room in its memory.

    The forward reads its input from buffers of `buffer_rows` rows that stay where they are. `max_pages` is the most
    pages that a sequence of a batch names. What a call returns is good until the next one.
    """

    def __init__(
        self,
        forward: Forward,
        plan: AttentionPlan,
        device: torch.device,
        buffer_rows: int,
        max_pages: int,
        capture: Capture = capture,
    ) -> None:
        self._forward, self._plan, self._device, self._max_pages = forward, plan, device, max_pages
        self._capture = capture
        self._sizes = ladder(buffer_rows)
        self._graphs: dict[int, Captured] = {}

    @property
    def max_rows(self) -> int:
        """The most rows of a call."""
        return self._sizes[-1]

    def __call__(self, rows: int) -> Tensor:
        if not self._graphs:
            self._plan.on_device(self._device).reserve(self.max_rows, self.max_rows, self.max_rows * self._max_pages)
            graphs: dict[int, Captured] = {}
            pool: Any = None
            for size in reversed(self._sizes):
                graphs[size] = self._capture(self._forward, size, pool)
                pool = graphs[size][2]
            self._graphs = graphs
        self._plan.on_device(self._device)  # a graph reads the plan from there and does not know when it is out of date
        replay, out, _ = self._graphs[self._sizes[bisect_left(self._sizes, rows)]]
        replay()
        return out[:rows]
