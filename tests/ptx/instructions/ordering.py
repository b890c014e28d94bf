"""Which accesses to shared memory happen before which, so that two that nothing orders are an error.

Every warp has a vector clock; barriers and mbarriers join them. Each four bytes of shared memory know who wrote them
last and when, and when each warp read them last. A write is ordered before an access of another warp when that warp's
clock has seen it. The async proxy (products that read shared memory, bulk copies) sees a write of ordinary
instructions only across a `fence.proxy.async` that lies between the two in this order (PTX ISA, "Memory consistency
model", "Causality order"), so there is a second clock of what is fenced.

Inside a warp everything counts as ordered. Two ordinary writes are never a conflict (warps do write the same values
side by side), nor is a write of one or two bytes to four of which another warp reads some.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tests.ptx.block import BLOCK_HOOKS, Block
from tests.ptx.syntax import PTXError
from tests.ptx.threads import Threads

_MANY = 256  # warps, and mbarriers that copies complete on
_NEVER = 2**40  # the time of a copy that nobody has waited for yet


class ProtocolError(PTXError):
    """A program breaks a rule of the asynchronous instructions; the message says which."""


def ordering_of(block: Block) -> Ordering:
    """The clocks of a block."""
    found: Ordering = block.state["ordering"]
    return found


def _begin(block: Block) -> None:
    ordering = block.state["ordering"] = Ordering(-(-block.size // 32), len(block.shared), fences=block.machine.strict)

    def wrote(threads: Threads, places: np.ndarray, size: int) -> None:
        ordering.wrote(threads.index // 32, places.astype(np.int64), size)

    def read(threads: Threads, places: np.ndarray, size: int) -> None:
        ordering.read(threads.index // 32, places.astype(np.int64), size)

    block.on_shared_store.append(wrote)
    block.on_shared_load.append(read)
    block.on_barrier.append(lambda threads: ordering.synchronised(np.unique(threads.index // 32)))


BLOCK_HOOKS.append(_begin)


class Ordering:
    """The clocks of one block of `warps` warps and the shadow of its `shared_bytes` of shared memory.

    `fences=False` takes every write for fenced: see `Machine`.
    """

    def __init__(self, warps: int, shared_bytes: int, *, fences: bool = True) -> None:
        self.warps, self.fences = warps, fences
        self.seen = np.zeros((warps, _MANY), np.int64)
        self.fenced = np.zeros((warps, _MANY), np.int64)
        self.seen[np.arange(warps), np.arange(warps)] = 1
        words = -(-shared_bytes // 4) + 4
        self.writers = np.zeros(words, np.int64)
        self.times = np.zeros(words, np.int64)
        self.reads = np.zeros((warps, words), np.int64)
        self.flying = np.zeros((warps, words), np.int32)  # reads of the async proxy that nobody has waited for
        self._actors: dict[int, int] = {}
        self._copies = np.zeros(_MANY, np.int64)

    def nothing(self) -> np.ndarray:
        """What an mbarrier publishes before anybody arrives: int64 [2, ...]."""
        return np.zeros((2, _MANY), np.int64)

    def now(self, warps: np.ndarray) -> np.ndarray:
        return self.seen[warps, warps]

    @staticmethod
    def _words(addresses: np.ndarray, size: int) -> np.ndarray:
        first = addresses >> 2
        return first[:, None] + np.arange(-(-size // 4)) if size > 4 else first[:, None]

    def wrote(self, warps: np.ndarray, addresses: np.ndarray, size: int) -> None:
        """Threads of `warps` wrote `size` bytes each at `addresses`. Raises ProtocolError for a race."""
        words = self._words(addresses, size)
        self._check_order(warps[:, None], words, "writes", self.warps)
        if size >= 4:
            self._check_reads(warps, words)
        self.writers[words] = warps[:, None]
        self.times[words] = self.now(warps)[:, None]

    def read(self, warps: np.ndarray, addresses: np.ndarray, size: int) -> None:
        """Threads of `warps` read `size` bytes each at `addresses`. Raises ProtocolError for a race."""
        words = self._words(addresses, size)
        self._check_order(warps[:, None], words, "reads")
        self.reads[warps[:, None], words] = self.now(warps)[:, None]

    def check_known(self, warps: np.ndarray, address: int) -> None:
        """Raises ProtocolError where the last write at this address is not ordered before what these warps do now."""
        self._check_order(warps, np.full(len(warps), address >> 2), "uses")

    def starts_copy(self, warps: np.ndarray, addresses: np.ndarray, size: int) -> None:
        """As `wrote`, by a copy (cp.async) that is complete only once `wrote` is called for it."""
        words = self._words(addresses, size)
        self._check_order(warps[:, None], words, "writes")
        self._check_reads(warps, words)
        self.writers[words] = warps[:, None]
        self.times[words] = _NEVER

    def ends_copy(self, warps: np.ndarray, addresses: np.ndarray, size: int) -> None:
        """The threads have waited for their copy: from now on it is a write of theirs."""
        words = self._words(addresses, size)
        self.times[words] = self.now(warps)[:, None]

    def starts_bulk_load(self, warp: int, pieces: np.ndarray, barrier: int) -> int:
        """The async proxy writes 16-byte `pieces` for `warp` and tells the mbarrier at `barrier`. Returns its time."""
        words = (pieces[:, None] * 4 + np.arange(4)).reshape(-1)
        self._check_order(np.array(warp), words, "has a bulk copy write")
        self._check_reads(np.array([warp]), words[None])
        if self.fences:
            self._check_fenced(np.array(warp), words, "writes")
        actor = self._actors.setdefault(barrier, self.warps + len(self._actors))
        self._copies[actor] += 1
        self.writers[words] = actor
        self.times[words] = self._copies[actor]
        return int(self._copies[actor])

    def ends_bulk_load(self, barrier: int, time: int, released: np.ndarray) -> None:
        """The copy is complete, and who waits for the mbarrier may see it (its `released` is given)."""
        actor = self._actors[barrier]
        released[:, actor] = np.maximum(released[:, actor], time)

    def starts_async_read(self, warps: Iterable[int], pieces: np.ndarray) -> None:
        """The async proxy reads 16-byte `pieces` for these warps, until `ends_async_read`.

        Raises ProtocolError where the last write is not ordered before, or not fenced.
        """
        words = (pieces.reshape(-1, 1) * 4 + np.arange(4)).reshape(-1)
        listed = np.fromiter(warps, np.int64)[:, None]
        self._check_order(listed, words[None], "has the async proxy read")
        if self.fences:
            self._check_fenced(listed, words[None], "reads")
        self.flying[listed, words] += 1

    def ends_async_read(self, warps: Iterable[int], pieces: np.ndarray) -> None:
        words = (pieces.reshape(-1, 1) * 4 + np.arange(4)).reshape(-1)
        listed = np.fromiter(warps, np.int64)[:, None]
        self.flying[listed, words] -= 1
        self.reads[listed, words] = self.now(listed)

    def _check_order(self, warps: np.ndarray, words: np.ndarray, verb: str, since: int = 0) -> None:
        """Against the last writes of those that are numbered `since` and up."""
        writers, times = self.writers[words], self.times[words]
        wrong = (times > self.seen[warps, writers]) & ((writers >= since) | (times == _NEVER))
        if wrong.any():
            place = tuple(np.argwhere(wrong)[0])
            warp, word, writer = (np.broadcast_to(each, wrong.shape)[place] for each in (warps, words, writers))
            raise ProtocolError(
                f"warp {warp} {verb} shared memory at {word * 4}, which {self._name(writer)} wrote, and has not waited "
                f"for that"
            )

    def _check_reads(self, warps: np.ndarray, words: np.ndarray) -> None:
        for warp in np.unique(warps):
            mine = words[warps == warp].reshape(-1)
            limits = self.seen[warp, : self.warps].copy()
            limits[warp] = _NEVER  # its own reads are done, but for those of the async proxy
            wrong = (self.reads[:, mine] > limits[:, None]) | (self.flying[:, mine] > 0)
            if wrong.any():
                other, place = np.argwhere(wrong)[0]
                raise ProtocolError(
                    f"warp {warp} writes shared memory at {mine[place] * 4} and has not waited for warp {other}, "
                    f"which reads there"
                )

    def _check_fenced(self, warps: np.ndarray, words: np.ndarray, verb: str) -> None:
        writers, times = self.writers[words], self.times[words]
        wrong = (times > self.fenced[warps, writers]) & (writers < self.warps)
        if wrong.any():
            place = tuple(np.argwhere(wrong)[0])
            warp, word, writer = (np.broadcast_to(each, wrong.shape)[place] for each in (warps, words, writers))
            raise ProtocolError(
                f"the async proxy {verb} shared memory at {word * 4} for warp {warp}, which {self._name(writer)} wrote "
                f"without a fence.proxy.async in between"
            )

    def _name(self, actor: int) -> str:
        if actor < self.warps:
            return f"warp {actor}"
        barrier = next(address for address, number in self._actors.items() if number == actor)
        return f"a bulk copy for the mbarrier at {barrier}"

    def fence(self, warps: np.ndarray) -> None:
        """`fence.proxy.async` of these warps."""
        self.fenced[warps] = np.maximum(self.fenced[warps], self.seen[warps])
        self.seen[warps, warps] += 1

    def synchronised(self, warps: np.ndarray) -> None:
        """These warps have met at a barrier."""
        self.seen[warps] = self.seen[warps].max(0)
        self.fenced[warps] = self.fenced[warps].max(0)
        self.seen[warps, warps] += 1

    def release(self, warps: np.ndarray, released: np.ndarray) -> None:
        """These warps arrive at an mbarrier whose `released` is given."""
        released[0] = np.maximum(released[0], self.seen[warps].max(0))
        released[1] = np.maximum(released[1], self.fenced[warps].max(0))
        self.seen[warps, warps] += 1

    def acquire(self, warps: np.ndarray, acquired: np.ndarray) -> None:
        """These warps have found a phase of an mbarrier complete, whose `acquired` is given."""
        self.seen[warps] = np.maximum(self.seen[warps], acquired[0])
        self.fenced[warps] = np.maximum(self.fenced[warps], acquired[1])
