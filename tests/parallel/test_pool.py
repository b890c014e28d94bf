"""The pool of ranks itself."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from engine.errors import ParallelError
from tests.parallel.pool import Hang, Pool, WorkerDied


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """A pool of its own: these tests break it."""
    pool = Pool(2)
    yield pool
    pool.close()


def place(offset: int, scale: int = 1) -> tuple[int, int, int]:
    return offset + scale * dist.get_rank(), dist.get_world_size(), torch.get_num_threads()


def process() -> int:
    return os.getpid()


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError("the third key")
    dist.barrier()


def fail_everywhere() -> None:
    raise KeyError(dist.get_rank())


def fail_in_two_ways() -> None:
    raise ParallelError("told by another") if dist.get_rank() == 0 else KeyError("the cause")


def stay_on(rank: int) -> None:
    if dist.get_rank() == rank:
        sleep_in_a_function_of_this_name()


def sleep_in_a_function_of_this_name() -> None:
    time.sleep(60)


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def leave_a_group() -> None:
    dist.new_group([0, 1])


def groups() -> int:
    return len(dist.distributed_c10d._world.pg_map)


class Unsendable(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__("needs two arguments")


def fail_unsendably() -> None:
    raise Unsendable(1, 2)


def test_results_come_in_rank_order_from_one_thread_each(pool: Pool) -> None:
    assert pool.run(place, 10, scale=5) == [(10, 2, 1), (15, 2, 1)]


def test_workers_stay_between_calls(pool: Pool) -> None:
    assert pool.run(process) == pool.run(process) == pool.pids()


def test_exception_on_one_rank_is_raised_with_rank_and_traceback(pool: Pool) -> None:
    with pytest.raises(KeyError, match="the third key") as caught:
        pool.run(fail_on, 1)
    note = caught.value.__notes__[0]
    assert note.startswith("on rank 1:") and "in fail_on" in note
    assert pool.run(place, 0) == [(0, 2, 1), (1, 2, 1)]


def test_exception_on_every_rank_keeps_the_pool(pool: Pool) -> None:
    before = pool.run(process)
    with pytest.raises(KeyError) as caught:
        pool.run(fail_everywhere)
    assert len(caught.value.__notes__) == 2
    assert pool.run(process) == before


def test_cause_is_raised_rather_than_what_tells_of_it(pool: Pool) -> None:
    with pytest.raises(KeyError, match="the cause"):
        pool.run(fail_in_two_ways)


def test_exception_that_does_not_travel_is_raised_as_text(pool: Pool) -> None:
    with pytest.raises(RuntimeError, match="Unsendable: needs two arguments"):
        pool.run(fail_unsendably)


def test_hang_ends_with_the_stack_of_the_rank(pool: Pool) -> None:
    with pytest.raises(Hang, match=r"(?s)ranks \[1\] in 2 s.*sleep_in_a_function_of_this_name"):
        pool.run(stay_on, 1, timeout=2)
    assert pool.run(place, 0) == [(0, 2, 1), (1, 2, 1)]


def test_death_of_a_worker_is_reported(pool: Pool) -> None:
    with pytest.raises((WorkerDied, RuntimeError)) as caught:
        pool.run(die_on, 1)
    assert "rank 1 died (exit code -9)" in "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert pool.run(place, 0) == [(0, 2, 1), (1, 2, 1)]


def test_groups_left_open_are_closed_after_the_call(pool: Pool) -> None:
    pool.run(leave_a_group)
    assert pool.run(groups) == [1, 1]
