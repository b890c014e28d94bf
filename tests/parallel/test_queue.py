"""The queue that replicas share: everything once, few at the end, and whoever is busy takes nothing."""

from __future__ import annotations

import torch.distributed as dist

from engine.config import ParallelConfig
from engine.parallel.mesh import Mesh, make_mesh
from engine.parallel.queue import COUNTER, Queue
from tests.parallel.pool import Pool


def taken(parallel: ParallelConfig, total: int, room: int, busy: int = -1) -> list[list[int]]:
    """What the replica of this rank takes, call by call, until nothing is left; replica `busy` takes the first share
    and no other."""
    mesh = make_mesh(parallel)
    queue = Queue("taken", [2] * total, mesh)
    shares = [list(queue.take(room))] if mesh.dp.index == busy else []
    dist.barrier()
    while mesh.dp.index != busy and (share := list(queue.take(room))):
        shares.append(share)
    dist.barrier()
    queue.close()
    mesh.close()
    return shares


def test_every_number_is_taken_once(pool4: Pool) -> None:
    shares = pool4.run(taken, ParallelConfig(dp=4), 101, room=1000)
    assert sorted(number for rank in shares for share in rank for number in share) == list(range(101))


def test_ranks_of_a_replica_take_the_same(pool4: Pool) -> None:
    first, second, third, fourth = pool4.run(taken, ParallelConfig(dp=2, tp=2), 40, room=6)
    assert first == second and third == fourth
    assert sorted(number for rank in (first, third) for share in rank for number in share) == list(range(40))


def test_shares_fit_the_room_and_shrink_towards_the_end(pool2: Pool) -> None:
    _, shares = pool2.run(taken, ParallelConfig(dp=2), 64, room=20, busy=0)
    sizes = [len(share) for share in shares]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 10  # of two samples each
    assert sizes[-1] == 1


def test_a_replica_that_is_busy_leaves_the_rest_to_the_other(pool2: Pool) -> None:
    busy, free = pool2.run(taken, ParallelConfig(dp=2), 64, room=8, busy=0)
    assert len(busy) == 1
    assert sum(map(len, free)) == 64 - len(busy[0])


def drained() -> list[int]:
    mesh = make_mesh(ParallelConfig(dp=2))
    queue = Queue("drained", [1] * 50, mesh)
    if mesh.rank == 1:
        queue.drain()
    dist.barrier()
    return list(queue.take(10))


def test_after_a_failure_nobody_gets_anything(pool2: Pool) -> None:
    assert pool2.run(drained) == [[], []]


def forgotten() -> int:
    mesh = make_mesh(ParallelConfig(dp=2))
    queue = Queue("forgotten", [1] * 5, mesh)
    queue.take(1)
    dist.barrier()
    queue.close()
    dist.barrier()
    return dist.PrefixStore("forgotten", dist.distributed_c10d._get_default_store()).add(COUNTER, 0)


def test_a_closed_queue_leaves_nothing_in_the_store(pool2: Pool) -> None:
    assert pool2.run(forgotten) == [0, 0]


def test_a_replica_that_is_alone_takes_all_at_once() -> None:
    queue = Queue("alone", [3] * 7, Mesh.single())
    assert queue.take(1) == range(7)
    assert queue.is_empty and not queue.take(100)
