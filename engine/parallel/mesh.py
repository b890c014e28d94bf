"""The grid of ranks: dp x pp x cp x tp, row-major, so that tensor-parallel ranks are neighbours.

dp 0                 dp 1                      replica   the ranks of one dp: they run in lockstep
pp 0:  r0 r1         pp 0:  r4 r5   <- tp      data      the ranks that hold the same weights (dp x cp):
pp 1:  r2 r3         pp 1:  r6 r7                        gradients are summed, optimizer state shared out
"""

from __future__ import annotations

import atexit
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from typing import Any

import torch
import torch.distributed as dist

from engine.config import ParallelConfig
from engine.errors import ConfigError, ParallelError
from engine.parallel.collectives import Group, all_gather

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
        groups = {name: next(g for g in _partition(name, shape) if rank in g) for name in _SPANS}
        return cls(**{name: Group(name, ranks, ranks.index(rank)) for name, ranks in groups.items()})

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

    def agree(self, call: str, fingerprint: int) -> None:
        """Every rank must make the same call with the same arguments. Raises ParallelError that names those who do
        not: a collective later on would hang or mix up their data."""
        if self.world.size == 1:
            return
        mine = torch.tensor([fingerprint & (2**63 - 1)])
        prints = all_gather(mine, self.world).view(-1).tolist()
        others = [rank for rank, value in enumerate(prints) if value != prints[0]]
        if others:
            raise ParallelError(
                f"{call} was called with other arguments on rank{'s' * (len(others) > 1)} "
                f"{', '.join(map(str, others))} than on rank 0; every rank makes the same calls"
            )

    def agree_any(self, flag: bool) -> bool:
        """True on every rank if it is True on any of them: so that no rank stops, or goes on, alone."""
        return bool(all_gather(torch.tensor([flag]), self.world).any())

    def close(self) -> None:
        """Ends the groups; the processes stay connected for other meshes until they exit."""
        handles = {id(g.handle): g.handle for g in self._groups() if g.handle not in (None, dist.group.WORLD)}
        if dist.is_initialized():
            for handle in handles.values():
                dist.destroy_process_group(handle)

    def _groups(self) -> Iterator[Group]:
        yield from (getattr(self, name) for name in _SPANS)


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
    if not dist.is_initialized() and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1:
        grid_shape(config, int(os.environ["WORLD_SIZE"]))  # a wrong mesh is refused before anyone waits
        try:
            dist.init_process_group("gloo", timeout=timeout)
        except RuntimeError as error:
            raise ParallelError(f"the ranks cannot connect ({error}); look at torchrun's rendezvous") from error
        atexit.register(_leave)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        grid_shape(config, 1)
        return Mesh.single()
    rank = dist.get_rank()
    shape = grid_shape(config, dist.get_world_size())
    made: dict[tuple[int, ...], Any] = {}
    mine: dict[str, Group] = {}
    for name in _SPANS:
        for ranks in _partition(name, shape):
            if ranks not in made:  # every rank makes every group, in the same order
                made[ranks] = dist.new_group(list(ranks), timeout=timeout) if len(ranks) > 1 else None
            if rank in ranks:
                mine[name] = Group(name, ranks, ranks.index(rank), made[ranks])
    return Mesh(**mine)


def ranks_on_this_machine() -> int:
    """How many ranks torchrun started here; they share its cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.is_torchelastic_launched() else 1


def _partition(name: str, shape: dict[str, int]) -> list[tuple[int, ...]]:
    """All groups of that name: the ranks of each, in order."""
    span = _SPANS[name]
    fixed = [axis for axis in AXES if axis not in span]
    strides = {axis: math.prod(shape[other] for other in AXES[i + 1 :]) for i, axis in enumerate(AXES)}

    def ranks(axes: list[str] | tuple[str, ...]) -> list[int]:
        places = product(*(range(shape[axis]) for axis in axes))
        return [sum(i * strides[axis] for i, axis in zip(place, axes, strict=True)) for place in places]

    return [tuple(base + offset for offset in ranks(span)) for base in ranks(fixed)]


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
