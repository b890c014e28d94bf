"""One queue for all replicas: each takes the next few numbers when it runs dry, so that one long answer keeps one
replica busy and not the rest.

    rank 0's store: taken = 13 of 20        dp 0:  0 1 2 | 7 8 9 | 12 ...
                                            dp 1:  3 4 5 6 | 10 11 | ...

The counter is raised atomically, and whoever raises it has the numbers that it passed. Shares are guided: a part of
what is left, so fewer and fewer towards the end. The first rank of a replica takes for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from engine.parallel.collectives import broadcast, named
from engine.parallel.mesh import Mesh

COUNTER = "taken"


class Queue:
    """Hands out the numbers of `costs`, in order, each to one replica. Number i stands for `costs[i]` samples; `name`
    is one that no other queue of these ranks had before."""

    def __init__(self, name: str, costs: Sequence[int], mesh: Mesh) -> None:
        self._costs = costs
        self._mesh = mesh
        self._store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store()) if mesh.dp.size > 1 else None
        self._seen = 0  # the counter when this replica last raised it

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left, as far as this replica has seen."""
        return self._seen >= len(self._costs)

    @property
    def fair_share(self) -> int:
        """Samples of each replica if all took as long."""
        return -(-sum(self._costs) // self._mesh.dp.size)

    def take(self, room: int) -> range:
        """The next numbers, as many as stand for about `room` samples or, where it has only one, one more; a replica
        that is alone takes all. None when nothing is left or there is no room.

        Every rank of a replica makes the same calls. Raises ParallelError when the ranks' store does not answer.
        """
        total = len(self._costs)
        if self.is_empty or room < 1:
            return range(0)
        if self._mesh.dp.size == 1:
            return self._raise(lambda seen: total)

        def share(seen: int) -> int:
            left = max(1, total - seen)
            fitting = room * left // max(1, sum(self._costs[seen:]))
            return max(1, min(fitting, left // (2 * self._mesh.dp.size)))

        return self._raise(share)

    def drain(self) -> None:
        """Leaves nothing for anybody: the call has failed."""
        if not self.is_empty:
            self._raise(lambda seen: len(self._costs))

    def close(self) -> None:
        """Forgets the counter, when all ranks are through with it."""
        if self._store is not None and self._mesh.is_main:
            self._store.delete_key(COUNTER)

    def _raise(self, share: Callable[[int], int]) -> range:
        """Takes as many as `share` says for what has been taken; others may take some in between."""
        span = torch.zeros(2, dtype=torch.int64)  # where the share begins and ends
        if self._mesh.replica.index == 0:
            span[1] = self._add(count := share(self._add(0)))
            span[0] = span[1] - count
        begin, self._seen = broadcast(span, self._mesh.replica, 0).tolist()
        total = len(self._costs)
        return range(min(total, begin), min(total, self._seen))

    def _add(self, count: int) -> int:
        if self._store is None:
            return self._seen + count
        with named("taking from the queue of prompts", self._mesh.world):
            return self._store.add(COUNTER, count)
