"""Copies in flight, apart from how instructions name them: cp.async of threads, and bulk copies of the async proxy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

Bytes = np.ndarray  # uint8


@dataclass
class ThreadCopies:
    """One cp.async of many threads: `size` bytes each, of which the first `taken` come from `sources` (global) and the
    rest are 0. `group` is the number of the group that each thread's copy belongs to; `left` the ones still to do."""

    threads: np.ndarray
    targets: np.ndarray
    sources: np.ndarray
    taken: np.ndarray
    size: int
    group: np.ndarray
    left: np.ndarray

    def run(self, which: np.ndarray, load: Callable[[np.ndarray, int], Bytes], shared: Bytes) -> None:
        """Does the copies that the mask `which` names; `load(addresses, size)` gives bytes [count, size] of memory."""
        data = np.zeros((int(which.sum()), self.size), np.uint8)
        taken = self.taken[which]
        for count in np.unique(taken[taken > 0]):
            rows = taken == count
            data[rows, :count] = load(self.sources[which][rows], int(count))
        shared[self.targets[which][:, None] + np.arange(self.size)] = data


@dataclass
class Groups:
    """How many groups of cp.async each thread of a block has committed, and what is in flight."""

    threads: int
    committed: np.ndarray = field(init=False)
    flying: list[ThreadCopies] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.committed = np.zeros(self.threads, np.int64)

    def due(self, threads: np.ndarray, most: int | None) -> list[tuple[ThreadCopies, np.ndarray]]:
        """What these threads wait for when at most `most` of their groups may be left (None: nothing at all, committed
        or not): copies and masks. They are in flight no longer."""
        limit = np.full(self.threads, -1, np.int64)
        limit[threads] = np.iinfo(np.int64).max if most is None else self.committed[threads] - most
        found = []
        for copies in self.flying:
            which = copies.left & (copies.group < limit[copies.threads])
            if which.any():
                copies.left = copies.left & ~which
                found.append((copies, which))
        self.flying = [copies for copies in self.flying if copies.left.any()]
        return found


@dataclass
class BulkStore:
    """A bulk copy out of shared memory: `read` takes the bytes from its 16-byte `pieces`, `write` puts them down."""

    read: Callable[[], Bytes]
    write: Callable[[Bytes], None]
    pieces: np.ndarray
    data: Bytes | None = None
    released: bool = False  # whether somebody has waited for it to have read

    def take(self) -> Bytes:
        if self.data is None:
            self.data = self.read().copy()
        return self.data


@dataclass
class BulkGroups:
    """The bulk stores of one thread: those of committed groups, oldest first, and the open ones."""

    groups: list[list[BulkStore]] = field(default_factory=list)
    open: list[BulkStore] = field(default_factory=list)

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def left(self) -> list[BulkStore]:
        return [store for group in [*self.groups, self.open] for store in group]
