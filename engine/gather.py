"""Whole tensors of the checkpoint on one rank, from the regions that the ranks of a mesh hold, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.parallel.collectives import all_gather_object, start_receive, start_send
from engine.parallel.mesh import Mesh
from engine.parts import Part
from engine.region import Region, whole

BLOCK_BYTES = 64 * 2**20  # what the gathering rank holds of a tensor


@dataclass(frozen=True)
class _Holder:
    rank: int
    region: Region


class Gatherer:
    """Brings tensors to the main rank. Every region comes from one rank: its owner in the first replica."""

    def __init__(self, parts: list[Part], mesh: Mesh) -> None:
        self._mesh = mesh
        first = mesh.dp.index == 0 and mesh.cp.index == 0
        self._mine = {part.name: part for part in parts if part.owned and first}
        self._holders: dict[str, list[_Holder]] = {}
        regions = [(part.name, Region(part.origin, part.shape)) for part in self._mine.values()]
        for rank, held in enumerate(all_gather_object(regions, mesh.world)):
            for name, region in held:
                self._holders.setdefault(name, []).append(_Holder(rank, region))

    def blocks(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[Region, Tensor | None]]:
        """The tensor of that name in blocks of whole rows, in order: the values, in CPU memory, on the main rank, None
        on the others.

        A collective: every rank exhausts it, and the main rank does so even when it can make no use of the values.
        Raises ParallelError.
        """
        for block in whole(shape).row_blocks(BLOCK_BYTES // dtype.itemsize):
            yield block, self._gather(name, block, dtype)

    def _gather(self, name: str, block: Region, dtype: torch.dtype) -> Tensor | None:
        out: Tensor | None = None
        world = self._mesh.world
        for holder in self._holders[name]:
            common = holder.region.overlap(block)
            if common is None:
                continue
            if holder.rank == self._mesh.rank:
                value = self._read(name, common, dtype)
                if not self._mesh.is_main:
                    start_send(value, world, 0).wait()
            elif self._mesh.is_main:
                value = start_receive(common.shape, dtype, world, holder.rank).wait()
            if not self._mesh.is_main:
                continue
            if common == block:
                return value
            if out is None:
                out = torch.empty(block.shape, dtype=dtype)
            out[common.within(block)] = value
        return out

    def _read(self, name: str, region: Region, dtype: torch.dtype) -> Tensor:
        """Rows of a part: `region` is as wide as it is."""
        part = self._mine[name]
        first = part.row + region.origin[0] - part.origin[0]
        return part.weight.dense(first, region.shape[0], dtype).cpu()
