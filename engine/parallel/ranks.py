"""The ranks as a program on top of the engine sees them: what one does for all, what each has to tell the others.

A world of one makes each call the plain thing, so that programs need no branch on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from engine.config import ParallelConfig
from engine.errors import EngineError
from engine.parallel.collectives import Group, all_gather, all_gather_object, broadcast_object
from engine.parallel.launch import connect

T = TypeVar("T")


class Ranks:
    """All ranks. Every rank makes the same calls, in the same order; each raises ParallelError when a rank is gone."""

    def __init__(self, world: Group) -> None:
        self._world = world

    @classmethod
    def join(cls, parallel: ParallelConfig | None = None) -> Ranks:
        """Connects the processes that torchrun started, if they are not connected yet. `Engine.ranks` is the same
        where there is an engine. Raises ParallelError."""
        connect(timedelta(seconds=(parallel or ParallelConfig()).timeout_seconds))
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls(Group("world"))
        return cls(Group("world", tuple(range(dist.get_world_size())), dist.get_rank(), dist.group.WORLD))

    @property
    def index(self) -> int:
        """The number of this rank."""
        return self._world.index

    @property
    def count(self) -> int:
        """How many there are."""
        return self._world.size

    def once(self, work: Callable[[], T]) -> T:
        """What rank 0 gets from `work`, which nobody else runs; the others wait for it. What it raises, all raise (as
        EngineError where it is an error of another kind, which only rank 0 sees as it was)."""
        if self.count == 1:
            return work()
        result: Any = None
        failure: BaseException | None = None
        if self.index == 0:
            try:
                result = work()
            except BaseException as error:
                failure = error
        result, kind, text = broadcast_object((result, *_described(failure)), self._world, 0)
        if failure is not None:
            raise failure
        if kind is not None:
            raise kind(text)
        return result

    def gather(self, value: T) -> list[T]:
        """`value` of every rank, in order. It is pickled: for what is no tensor."""
        return all_gather_object(value, self._world)

    def any(self, flag: bool) -> bool:
        """True on every rank if `flag` is True on any: so that no rank stops, or goes on, alone."""
        return bool(all_gather(torch.tensor(flag), self._world).any())


def _described(failure: BaseException | None) -> tuple[type[BaseException] | None, str]:
    if failure is None:
        return None, ""
    if isinstance(failure, EngineError):
        return type(failure), str(failure)
    if isinstance(failure, KeyboardInterrupt):
        return KeyboardInterrupt, ""
    return EngineError, f"on rank 0: {type(failure).__name__}: {failure}"
