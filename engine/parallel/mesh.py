"""The grid of ranks: dp x pp x cp x tp, row-major, so that tensor-parallel ranks are neighbours.

dp 0                 dp 1                      replica   the ranks of one dp: they run in lockstep
pp 0:  r0 r1         pp 0:  r4 r5   <- tp      data      the ranks that hold the same weights (dp x cp):
pp 1:  r2 r3         pp 1:  r6 r7                        gradients are summed, optimizer state shared out
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from engine.config import ParallelConfig
from engine.errors import ConfigError, ParallelError
from engine.parallel.collectives import Group, all_gather, named
from engine.parallel.launch import connect, world_size
from engine.parallel.links import Link, Links, links_of

AXES = ("dp", "pp", "cp", "tp")


@dataclass(frozen=True)
class Mesh:
    """The groups that this rank belongs to."""

    dp: Group
    pp: Group
    cp: Group
    tp: Group
    replica: Group
    data: Group
    world: Group
    links: Links  # between the stages of this rank's pipeline

    @classmethod
    def single(cls) -> Mesh:
        """A world of one rank."""
        return cls.layout(ParallelConfig(), 1, 0)

    @classmethod
    def layout(cls, config: ParallelConfig, world_size: int, rank: int) -> Mesh:
        """The groups of one rank, without connections: for plans, and as the shape of real ones.

        Raises ConfigError when the grid does not have as many places as there are ranks.
        """
        shape = grid_shape(config, world_size)
        members = {name: _group_of(rank, name, shape) for name in _SPANS}
        groups = {name: Group(name, ranks, ranks.index(rank)) for name, ranks in members.items()}
        return cls(**groups, links=Links.layout(groups["pp"], config.chunks_per_stage))

    @property
    def rank(self) -> int:
        return self.world.index

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks for all: it prints and writes the files that are written once."""
        return self.world.index == 0

    @property
    def shape(self) -> dict[str, int]:
        """Ranks along each axis."""
        return {axis: getattr(self, axis).size for axis in AXES}

    def __str__(self) -> str:
        return " x ".join(f"{axis} {size}" for axis, size in self.shape.items())

    def agree(self, call: str, *arguments: object) -> None:
        """Every rank must make the same call with the same arguments. Raises ParallelError that names those who do
        not: a collective later on would hang or mix up their data."""
        if self.world.size == 1:
            return
        prints = all_gather(torch.tensor(fingerprint(call, *arguments)), self.world).tolist()
        others = [rank for rank, value in enumerate(prints) if value != prints[0]]
        if others:
            raise ParallelError(
                f"{call} was called with other arguments on rank{'s' * (len(others) > 1)} "
                f"{', '.join(map(str, others))} than on rank 0; every rank makes the same calls"
            )

    def close(self) -> None:
        """Ends the groups; the processes stay connected for other meshes until they exit."""
        handles = {id(g.handle): g.handle for g in self._groups() if g.handle not in (None, dist.group.WORLD)}
        if dist.is_initialized():
            for handle in handles.values():
                dist.destroy_process_group(handle)

    def _groups(self) -> Iterator[Group]:
        yield from (getattr(self, name) for name in _SPANS)
        yield from self.links.groups.values()


# Which axes a group spans; the others are held fixed.
_SPANS: dict[str, tuple[str, ...]] = {
    "dp": ("dp",),
    "pp": ("pp",),
    "cp": ("cp",),
    "tp": ("tp",),
    "replica": ("pp", "cp", "tp"),
    "data": ("dp", "cp"),
    "world": AXES,
}


def grid_shape(config: ParallelConfig, world_size: int) -> dict[str, int]:
    """Ranks along each axis; dp = 0 is filled in. Raises ConfigError."""
    model = config.pp * config.cp * config.tp
    dp = config.dp or max(1, world_size // model)
    if dp * model != world_size:
        raise ConfigError(
            f"the mesh dp {config.dp or 'any'} x pp {config.pp} x cp {config.cp} x tp {config.tp} does not make "
            f"{world_size} ranks, which is how many there are; start {dp * model} (torchrun --nproc-per-node), or "
            "change parallel.dp, pp, cp or tp"
        )
    return {"dp": dp, "pp": config.pp, "cp": config.cp, "tp": config.tp}


def make_mesh(config: ParallelConfig) -> Mesh:
    """Joins the processes that torchrun started (or that torch.distributed connects already) to a mesh.

    Raises ConfigError when the mesh does not fit the number of ranks, ParallelError when they cannot connect.
    """
    timeout = timedelta(seconds=config.timeout_seconds)
    shape = grid_shape(config, world_size())  # a wrong mesh is refused before anyone waits
    connect(timeout)
    if world_size() == 1:
        return Mesh.single()
    rank = dist.get_rank()
    made: dict[tuple[int, ...], Any] = {}
    mine: dict[str, Group] = {}
    for name in _SPANS:
        for ranks in _partition(name, shape):
            if ranks not in made:  # every rank makes every group, in the same order
                with named("new_group", Group(name, ranks)):
                    made[ranks] = dist.new_group(list(ranks), timeout=timeout) if len(ranks) > 1 else None
            if rank in ranks:
                mine[name] = Group(name, ranks, ranks.index(rank), made[ranks])
    ours: dict[Link, Any] = {}
    for stages in _partition("pp", shape):
        for link in links_of(len(stages), config.chunks_per_stage):
            group = link.group(stages, stages[link.source])
            with named("new_group", group):
                handle = dist.new_group(list(group.ranks), timeout=timeout)
            if rank in stages:
                ours[link] = handle
    return Mesh(**mine, links=Links.layout(mine["pp"], config.chunks_per_stage, ours))


def another_group(group: Group, timeout_seconds: float) -> Group:
    """The same ranks with connections of their own, for a thread beside the one that uses `group`. Every rank of the
    world calls it at the same point; `close_group` ends it."""
    if group.size == 1:
        return group
    handle = dist.new_group(list(group.ranks), timeout=timedelta(seconds=timeout_seconds))
    return Group(group.name, group.ranks, group.index, handle)


def close_group(group: Group) -> None:
    """Ends the connections of a group that `another_group` made."""
    if group.handle is not None and dist.is_initialized():
        dist.destroy_process_group(group.handle)


def fingerprint(*arguments: object) -> int:
    """63 bits that are a function of the arguments' values alone; of what is no plain data, of its name or type."""
    try:
        text = msgspec.msgpack.encode(arguments, enc_hook=_plain)
    except (OverflowError, TypeError, ValueError):  # numbers of more than 64 bits, keys that are no strings
        text = repr(arguments).encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _partition(name: str, shape: dict[str, int]) -> list[tuple[int, ...]]:
    """All groups of that name: the ranks of each, in order."""
    fixed = tuple(axis for axis in AXES if axis not in _SPANS[name])
    return [_group_of(base, name, shape) for base in _offsets(fixed, shape)]


def _group_of(rank: int, name: str, shape: dict[str, int]) -> tuple[int, ...]:
    """The group of that name that a rank is in."""
    strides, span = _strides(shape), _SPANS[name]
    base = rank - sum(rank // strides[axis] % shape[axis] * strides[axis] for axis in span)
    return tuple(base + offset for offset in _offsets(span, shape))


def _offsets(axes: tuple[str, ...], shape: dict[str, int]) -> list[int]:
    """Ranks at all places along some axes and at place 0 of the others."""
    strides = _strides(shape)
    places = product(*(range(0, shape[axis] * strides[axis], strides[axis]) for axis in axes))
    return [sum(place) for place in places]


def _strides(shape: dict[str, int]) -> dict[str, int]:
    """What one place along an axis is in ranks."""
    return {axis: math.prod(shape[other] for other in AXES[i + 1 :]) for i, axis in enumerate(AXES)}


def _plain(value: Any) -> object:
    """What stands for a value that msgspec does not know."""
    if isinstance(value, torch.Tensor):
        return [
            str(value.dtype),
            *value.shape,
            value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data,
        ]
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return getattr(value, "__qualname__", type(value).__qualname__)
