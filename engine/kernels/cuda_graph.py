"""Forwards of few rows as CUDA graphs: one launch a step instead of one for each kernel.

A CUDA graph replays exactly the rows it was captured with, so there is one for each of a ladder of sizes, and a step
takes the first that is large enough:

    rows of the step   1  2  3  5  9 ...  250   300
    rows of the graph  1  2  4  8  16 ... 256   none: the kernels are launched one by one

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

MAX_GRAPH_ROWS = 256  # with more rows the kernels take longer than their launches

Forward = Callable[[int], Tensor]
Capture = Callable[[Forward, int, Any], tuple[Callable[[], None], Tensor]]


def ladder(max_rows: int) -> list[int]:
    """The sizes of the graphs, ascending: 1, 2, 4, then multiples of 8, the last one `max_rows` or MAX_GRAPH_ROWS."""
    last = min(max_rows, MAX_GRAPH_ROWS)
    return [size for size in (1, 2, 4, *range(8, last, 8)) if size < last] + [last]


def capture(forward: Forward, rows: int, pool: Any) -> tuple[Callable[[], None], Tensor]:
    """Captures `forward(rows)`; returns what replays it, and its output, which lies where each replay writes it."""
    forward(rows)  # compiles and loads kernels, which a capture must not do
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # a saver's thread may copy meanwhile
        out = forward(rows)
    return graph.replay, out


class CudaGraphs:
    """`forward(rows)`, which reads its input from buffers of `max_rows` rows that stay where they are, from graphs that
    are captured at the first call, the largest first, so that the others find room in its memory.

    What a call returns is good until the next one.
    """

    def __init__(self, forward: Forward, max_rows: int, capture: Capture = capture) -> None:
        self._forward = forward
        self._capture = capture
        self._sizes = ladder(max_rows)
        self._graphs: dict[int, tuple[Callable[[], None], Tensor]] = {}

    def __call__(self, rows: int) -> Tensor:
        if rows > self._sizes[-1]:
            return self._forward(rows)
        if not self._graphs:
            pool = torch.cuda.graph_pool_handle()
            self._graphs = {size: self._capture(self._forward, size, pool) for size in reversed(self._sizes)}
        replay, out = self._graphs[self._sizes[bisect_left(self._sizes, rows)]]
        replay()
        return out[:rows]
