"""Which sizes are captured as CUDA graphs, in which order, and which one serves. Captures themselves need a GPU."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.attention_plan import AttentionPlan
from engine.kernels.cuda_graph import MAX_GRAPH_ROWS, Captured, CudaGraphs, Forward, capture, ladder
from engine.kernels.op import triton_missing

needs_triton = pytest.mark.skipif(bool(triton_missing()), reason=triton_missing() or "installed")


class Tape:
    """Captures by running the forward again at each replay, into the same output."""

    def __init__(self) -> None:
        self.captured: list[int] = []
        self.replayed: list[int] = []

    def __call__(self, forward: Forward, rows: int, pool: object) -> Captured:
        assert pool == ("pool" if self.captured else None)
        self.captured.append(rows)
        out = forward(rows)

        def replay() -> None:
            self.replayed.append(rows)
            out.copy_(forward(rows))

        return replay, out, "pool"


def graphs(forward: Forward, buffer_rows: int, tape: Tape | None = None) -> CudaGraphs:
    plan = AttentionPlan.of_sequences([1])
    return CudaGraphs(forward, plan, torch.device("cpu"), buffer_rows, 1, tape or capture)


@pytest.mark.parametrize(
    ("max_rows", "sizes"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (20, [1, 2, 4, 8, 16, 20])],
)
def test_sizes_grow_up_to_the_most_rows(max_rows, sizes):
    assert ladder(max_rows) == sizes


def test_no_graph_is_larger_than_the_largest():
    assert ladder(10_000)[-2:] == [MAX_GRAPH_ROWS - 8, MAX_GRAPH_ROWS]


@needs_triton
def test_all_sizes_are_captured_once_and_the_largest_first():
    tape = Tape()
    run = graphs(lambda rows: torch.zeros(rows, 2), 10, tape)
    for rows in (3, 10, 1):
        run(rows)
    assert tape.captured == [10, 8, 4, 2, 1]


@needs_triton
def test_the_first_graph_that_is_large_enough_serves_and_its_real_rows_come_back():
    tape, buffer = Tape(), torch.arange(20.0)
    run = graphs(lambda rows: 2 * buffer[:rows], 20, tape)
    for rows in range(1, 21):
        buffer.add_(1)
        assert torch.equal(run(rows), 2 * buffer[:rows])
    assert tape.replayed == [1, 2, *[4] * 2, *[8] * 4, *[16] * 8, *[20] * 4]


def test_a_graph_takes_no_more_rows_than_it_says():
    assert graphs(lambda rows: torch.zeros(rows, 2), 2048).max_rows == MAX_GRAPH_ROWS
    assert graphs(lambda rows: torch.zeros(rows, 2), 24).max_rows == 24
