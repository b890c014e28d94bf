"""Regions of tensors: how the parts that ranks hold, and the pieces that files hold, overlap."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Region:
    """The elements of a tensor that begin at `origin` and have `shape`: rows, or rows and columns."""

    origin: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    def overlap(self, other: Region) -> Region | None:
        """What both hold, or None."""
        begin = tuple(max(a, b) for a, b in zip(self.origin, other.origin, strict=True))
        end = tuple(min(a, b) for a, b in zip(self._end, other._end, strict=True))
        shape = tuple(e - b for b, e in zip(begin, end, strict=True))
        return Region(begin, shape) if min(shape) > 0 else None

    def within(self, outer: Region) -> tuple[slice, ...]:
        """This region as an index into a tensor that holds `outer`, of which it is a part."""
        starts = (a - b for a, b in zip(self.origin, outer.origin, strict=True))
        return tuple(slice(start, start + size) for start, size in zip(starts, self.shape, strict=True))

    def rows(self, first: int, count: int) -> Region:
        """Rows [first, first + count) of it, counted from its own first row."""
        return Region((self.origin[0] + first, *self.origin[1:]), (count, *self.shape[1:]))

    def row_blocks(self, max_elements: int) -> Iterator[Region]:
        """Itself in blocks of whole rows, in order, each of at most `max_elements` or one row."""
        step = max(1, max_elements // max(1, self.num_elements // self.shape[0]))
        for first in range(0, self.shape[0], step):
            yield self.rows(first, min(step, self.shape[0] - first))

    @property
    def _end(self) -> tuple[int, ...]:
        return tuple(first + size for first, size in zip(self.origin, self.shape, strict=True))


def whole(shape: tuple[int, ...]) -> Region:
    """The region that is all of a tensor."""
    return Region((0,) * len(shape), shape)


def first_fault(region: Region, pieces: list[Region]) -> tuple[tuple[int, ...], int] | None:
    """An element of `region` that not exactly one of `pieces` holds, and how many do; None when there is none.

    Counts on the grid that the pieces' edges make, so the cost does not depend on the size of the tensor.
    """
    here = [common for piece in pieces if (common := region.overlap(piece))]
    axes = range(len(region.shape))
    cuts = [sorted({edge for part in (region, *here) for edge in (part.origin[a], part._end[a])}) for a in axes]
    places = [{edge: place for place, edge in enumerate(edges)} for edges in cuts]
    counts = np.zeros([len(edges) - 1 for edges in cuts], dtype=np.int64)
    for part in here:
        counts[tuple(slice(places[a][part.origin[a]], places[a][part._end[a]]) for a in axes)] += 1
    wrong = np.argwhere(counts != 1)
    if not len(wrong):
        return None
    cell = tuple(int(place) for place in wrong[0])
    return tuple(cuts[a][cell[a]] for a in axes), int(counts[cell])
