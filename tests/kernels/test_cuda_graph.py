"""Which sizes are captured as CUDA graphs, in which order, and which one serves. Captures themselves need a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.kernels.cuda_graph import MAX_GRAPH_ROWS, CudaGraphs, Forward, ladder


class Tape:
    """Captures by running the forward again at each replay, into the same output."""

    def __init__(self, monkeypatch) -> None:
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        self.captured: list[int] = []
        self.replayed: list[int] = []

    def __call__(self, forward: Forward, rows: int, pool: object) -> tuple[Callable[[], None], Tensor]:
        assert pool == "pool"
        self.captured.append(rows)
        out = forward(rows)

        def replay() -> None:
            self.replayed.append(rows)
            out.copy_(forward(rows))

        return replay, out


@pytest.mark.parametrize(
    ("max_rows", "sizes"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (20, [1, 2, 4, 8, 16, 20])],
)
def test_sizes_grow_up_to_the_most_rows(max_rows, sizes):
    assert ladder(max_rows) == sizes


def test_no_graph_is_larger_than_the_largest():
    assert ladder(10_000)[-2:] == [MAX_GRAPH_ROWS - 8, MAX_GRAPH_ROWS]


def test_all_sizes_are_captured_once_and_the_largest_first(monkeypatch):
    tape = Tape(monkeypatch)
    run = CudaGraphs(lambda rows: torch.zeros(rows, 2), 10, tape)
    for rows in (3, 10, 1):
        run(rows)
    assert tape.captured == [10, 8, 4, 2, 1]


def test_the_first_graph_that_is_large_enough_serves_and_its_real_rows_come_back(monkeypatch):
    tape, buffer = Tape(monkeypatch), torch.arange(20.0)
    run = CudaGraphs(lambda rows: 2 * buffer[:rows], 20, tape)
    for rows in range(1, 21):
        buffer.add_(1)
        assert torch.equal(run(rows), 2 * buffer[:rows])
    assert tape.replayed == [1, 2, *[4] * 2, *[8] * 4, *[16] * 8, *[20] * 4]


def test_more_rows_than_any_graph_has_run_eagerly(monkeypatch):
    tape, seen = Tape(monkeypatch), []

    def forward(rows: int) -> Tensor:
        seen.append(rows)
        return torch.zeros(rows, 2)

    run = CudaGraphs(forward, 2048, tape)
    assert run(MAX_GRAPH_ROWS + 1).shape == (MAX_GRAPH_ROWS + 1, 2)
    assert (tape.captured, seen) == ([], [MAX_GRAPH_ROWS + 1])
