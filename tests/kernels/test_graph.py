"""Host calls: Python functions that run between the kernels of a recorded forward."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor

from engine.kernels.graph import Graph, empty, host_call
from engine.kernels.swiglu import swiglu
from tests.kernels.cases import needs_cpu, randn, record
from tests.row_invariance import assert_same_bits

pytestmark = needs_cpu


def doubled(x: Tensor) -> Tensor:
    """2 x by a host call, in a tensor of its own."""
    out = empty(tuple(x.shape), x.dtype)

    def double(rows: int) -> None:
        torch.mul(x[:rows], 2, out=out[:rows])

    host_call(double, x.shape[0])
    return out


def forward(x: Tensor) -> Tensor:
    """Kernel, host call, kernel: [T, 64] -> [T, 16]."""
    return swiglu(doubled(swiglu(x)))


@torch.no_grad()
def test_a_host_call_outside_of_a_recording_runs_at_once() -> None:
    seen: list[int] = []
    host_call(seen.append, 7)
    assert seen == [7]


@torch.no_grad()
def test_a_recorded_host_call_runs_at_replay_with_the_rows_of_the_replay() -> None:
    seen: list[int] = []
    graph, _ = record(lambda: host_call(seen.append, 12))
    assert seen == []
    assert len(graph) == 1
    graph.replay(5)
    graph.replay(12)
    assert seen == [5, 12]


@torch.no_grad()
def test_host_calls_run_between_the_kernels_they_were_recorded_between() -> None:
    x = randn(12, 64)
    graph, out = record(lambda: forward(x))
    for seed, rows in enumerate((12, 5, 1)):
        x.copy_(randn(12, 64, seed=seed))
        graph.replay(rows)
        assert_same_bits(out[:rows], forward(x[:rows].contiguous()), f"{rows} rows")


@torch.no_grad()
def test_what_a_host_call_raises_leaves_replay_and_the_graph_replays_again() -> None:
    x, failure = randn(12, 64), ValueError("the network is down")
    failing = True

    def build() -> Tensor:
        half = swiglu(x)

        def fail(rows: int) -> None:
            if failing:
                raise failure

        host_call(fail, 12)
        return swiglu(half)

    graph, out = record(build)
    out.fill_(3.0)
    with pytest.raises(ValueError, match="the network is down") as caught:
        graph.replay(12)
    assert caught.value is failure
    assert (out == 3.0).all(), "a kernel ran after the call that failed"
    failing = False
    graph.replay(12)
    assert_same_bits(out, swiglu(swiglu(x)), "after the failure")


@torch.no_grad()
def test_an_interrupt_in_a_host_call_leaves_replay() -> None:
    def interrupt(rows: int) -> None:
        raise KeyboardInterrupt

    graph, _ = record(lambda: host_call(interrupt, 3))
    with pytest.raises(KeyboardInterrupt):
        graph.replay(3)
    graph.__enter__()  # not taken for a graph that is still replaying
    graph.__exit__()


@torch.no_grad()
def test_a_kernel_inside_a_host_call_runs_at_once() -> None:
    x, results = randn(6, 64), []
    graph, _ = record(lambda: host_call(lambda rows: results.append(swiglu(x[:rows].contiguous())), 6))
    graph.replay(4)
    assert_same_bits(results[0], swiglu(x[:4].contiguous()), "kernel in a host call")


@torch.no_grad()
def test_other_threads_run_while_a_replay_computes_and_a_host_call_waits_for_them() -> None:
    """A collective blocks until another thread has answered: the lock of Python must be free for that thread."""
    asked, answered = threading.Event(), threading.Event()

    def answer() -> None:
        if asked.wait(20):
            answered.set()

    def ask(rows: int) -> None:
        asked.set()
        assert answered.wait(20), "the other thread never ran"

    graph, _ = record(lambda: host_call(ask, 1))
    other = threading.Thread(target=answer)
    other.start()
    graph.replay(1)
    other.join()


@torch.no_grad()
def test_recording_again_forgets_the_host_calls_of_before() -> None:
    first: list[int] = []
    second: list[int] = []
    graph = Graph()
    with graph:
        host_call(first.append, 1)
    with graph:
        host_call(second.append, 1)
    graph.replay(1)
    assert (first, second) == ([], [1])


@torch.no_grad()
def test_a_graph_cannot_record_while_it_replays() -> None:
    graph = Graph()

    def again(rows: int) -> None:
        graph.__enter__()

    with graph:
        host_call(again, 1)
    with pytest.raises(RuntimeError, match="while it is replaying"):
        graph.replay(1)


@torch.no_grad()
def test_a_replay_cannot_be_part_of_a_recording() -> None:
    inner, _ = record(lambda: host_call(lambda rows: None, 1))
    with Graph(), pytest.raises(RuntimeError, match="recording on this thread"):
        inner.replay(1)


def test_an_owner_that_its_graphs_host_call_refers_to_is_collected() -> None:
    """The sampler owns the graph, whose host calls know the sampler: together they must go."""

    class Owner:
        def __init__(self) -> None:
            with Graph() as graph:
                host_call(self.call, 1)
            self.graph = graph

        def call(self, rows: int) -> None:
            self.rows = rows

    owner = Owner()
    owner.graph.replay(3)
    assert owner.rows == 3
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is None
