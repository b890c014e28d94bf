"""mbarriers: phases, pending arrivals and bytes still to come, and the instructions on them (PTX ISA, "mbarrier")."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from tests.ptx.block import BLOCK_HOOKS, Block
from tests.ptx.instructions.ordering import ProtocolError, ordering_of
from tests.ptx.operands import addresses, reader, writer
from tests.ptx.operations import Run, operation
from tests.ptx.spaces import SHARED_WINDOW
from tests.ptx.syntax import Instruction, Operand, Sink
from tests.ptx.threads import Threads, full

_MOST_ARRIVALS = 2**20 - 1
_MOST_BYTES = 2**20 - 1
SEAL = np.frombuffer(b"mbarrier", np.uint8)  # what the eight bytes of a live one hold here: nobody else may write there


@dataclass
class Barrier:
    """An mbarrier that `expected` arrivals complete, phase after phase.

    `released` is what the arrivals of the current phase have published, and `acquired` what the ones of completed
    phases have: see `tests.ptx.instructions.ordering`.
    """

    address: int
    expected: int
    released: np.ndarray
    acquired: np.ndarray
    phase: int = 0
    bytes_to_come: int = 0
    pending: int = field(init=False)

    def __post_init__(self) -> None:
        if not 1 <= self.expected <= _MOST_ARRIVALS:
            raise ProtocolError(f"{self} is made for {self.expected} arrivals; 1 to {_MOST_ARRIVALS} are possible")
        self.pending = self.expected

    def __str__(self) -> str:
        return f"mbarrier at {self.address} of shared memory"

    def arrive(self, count: int = 1) -> None:
        """Raises ProtocolError where more arrive than the phase has to wait for."""
        if not 1 <= count <= self.pending:
            raise ProtocolError(f"{count} arrive at the {self}, whose phase {self.phase} waits for {self.pending}")
        self.pending -= count
        self._complete()

    def expect(self, size: int) -> None:
        """The phase waits for so many bytes more; a negative size is bytes that have come."""
        self.bytes_to_come += size
        if abs(self.bytes_to_come) > _MOST_BYTES:
            raise ProtocolError(f"{self} counts {self.bytes_to_come} bytes to come; {_MOST_BYTES} are the most")
        self._complete()

    def passed(self, parity: int) -> bool:
        """Whether the last phase of this parity is complete; the one before the first counts as complete."""
        return self.phase & 1 != parity

    def _complete(self) -> None:
        if self.pending == 0 and self.bytes_to_come == 0:
            self.phase, self.pending = self.phase + 1, self.expected
            np.maximum(self.acquired, self.released, out=self.acquired)
            self.released[:] = 0

    @property
    def state(self) -> str:
        """For the report of a deadlock."""
        return (
            f"{self}: phase {self.phase} (parity {self.phase & 1}) waits for {self.pending} of {self.expected} "
            f"arrivals and {self.bytes_to_come} bytes"
        )


def _begin(block: Block) -> None:
    block.state["mbarriers"] = {}


BLOCK_HOOKS.append(_begin)


def barrier_at(block: Block, place: int) -> Barrier:
    """The mbarrier at an address of shared memory. Raises ProtocolError where there is none, or where something else
    has written to its bytes."""
    found: Barrier | None = block.state["mbarriers"].get(place)
    if found is None:
        raise ProtocolError(f"there is no mbarrier at {place} of shared memory: no mbarrier.init was done")
    if not np.array_equal(block.shared[place : place + 8], SEAL):
        raise ProtocolError(f"something else has written to the {found}")
    return found


def shared_places(instruction: Instruction, operand: Operand) -> Callable[[Threads], np.ndarray]:
    """Function of threads to the int64 [count] addresses in shared memory that an operand names, generic or not."""
    get = addresses(instruction, operand)

    def places(threads: Threads) -> np.ndarray:
        return (get(threads) & np.uint64(SHARED_WINDOW - 1)).astype(np.int64)

    return places


@operation("mbarrier")
def _mbarrier(instruction: Instruction) -> Run:
    """mbarrier.init, .inval, .arrive, .expect_tx, .test_wait and .try_wait. A test waits as a try does: a program that
    has something else to do in the meantime does not do it here."""
    what = instruction.modifiers[0]
    if instruction.has("noComplete") or what not in _DECODERS:
        raise instruction.error("not modelled")
    return _DECODERS[what](instruction)


def _each(places: np.ndarray, threads: Threads, *values: np.ndarray) -> Iterator[tuple[int, Threads, list[int]]]:
    """The threads that name the same address and the same values."""
    table = np.stack([places, *(full(each, threads).astype(np.int64) for each in values)])
    for row in np.unique(table, axis=1).T:
        yield int(row[0]), threads.where((table == row[:, None]).all(0)), row[1:].tolist()


def _init(instruction: Instruction) -> Run:
    places_of, count_of = shared_places(instruction, instruction.operands[0]), _number(instruction, 1)

    def run(block: Block, threads: Threads) -> None:
        ordering = ordering_of(block)
        for place, who, (count,) in _each(places_of(threads), threads, count_of(threads)):
            if who.count > 1 or place % 8 or place + 8 > len(block.shared):
                raise ProtocolError(f"{who.count} threads make an mbarrier at {place} of shared memory")
            ordering.wrote(who.index // 32, np.array([place]), 8)
            block.state["mbarriers"][place] = Barrier(place, count, ordering.nothing(), ordering.nothing())
            block.shared[place : place + 8] = SEAL

    return run


def _inval(instruction: Instruction) -> Run:
    places_of = shared_places(instruction, instruction.operands[0])

    def run(block: Block, threads: Threads) -> None:
        for place, who, _ in _each(places_of(threads), threads):
            barrier_at(block, place)
            ordering_of(block).wrote(who.index[:1] // 32, np.array([place]), 8)
            del block.state["mbarriers"][place]
            block.shared[place : place + 8] = 0xFF

    return run


def _number(instruction: Instruction, place: int) -> Callable[[Threads], np.ndarray]:
    """The operand at this place, or 1."""
    if place < len(instruction.operands):
        return reader(instruction, instruction.operands[place], "u32")
    return lambda threads: np.ones(1, np.uint32)


def _arrive(instruction: Instruction) -> Run:
    """.arrive and .arrive.expect_tx; the token is the number of the phase."""
    expects, gives = instruction.has("expect_tx"), not isinstance(instruction.operands[0], Sink)
    put = writer(instruction, instruction.operands[0], "u64")
    places_of, count_of = shared_places(instruction, instruction.operands[1]), _number(instruction, 2)

    def run(block: Block, threads: Threads) -> None:
        for place, who, (count,) in _each(places_of(threads), threads, count_of(threads)):
            barrier = _ordered(block, who, place)
            if gives:
                put(who, np.full(who.count, barrier.phase, np.uint64))
            if expects:
                barrier.expect(count * who.count)
            ordering_of(block).release(np.unique(who.index // 32), barrier.released)
            barrier.arrive(who.count if expects else count * who.count)

    return run


def _expect(instruction: Instruction) -> Run:
    places_of, size_of = shared_places(instruction, instruction.operands[0]), _number(instruction, 1)

    def run(block: Block, threads: Threads) -> None:
        for place, who, (size,) in _each(places_of(threads), threads, size_of(threads)):
            _ordered(block, who, place).expect(size * who.count)

    return run


def _wait(instruction: Instruction) -> Run:
    """.test_wait and .try_wait, with a parity or a token."""
    by_parity = instruction.has("parity")
    put = writer(instruction, instruction.operands[0], "pred")
    places_of = shared_places(instruction, instruction.operands[1])
    phase_of = reader(instruction, instruction.operands[2], "u32" if by_parity else "u64")

    def run(block: Block, threads: Threads) -> None:
        waits = []
        for place, who, (phase,) in _each(places_of(threads), threads, phase_of(threads)):
            barrier = _ordered(block, who, place)

            def ready(barrier: Barrier = barrier, phase: int = phase) -> bool:
                return barrier.passed(phase) if by_parity else barrier.phase > phase

            if ready():
                ordering_of(block).acquire(np.unique(who.index // 32), barrier.acquired)
                put(who, np.ones(who.count, bool))
            else:
                waits.append((who, ready, _Waiting(f"{'parity' if by_parity else 'phase'} {phase}", barrier)))
        block.wait(instruction, waits, again=True)

    return run


@dataclass(frozen=True)
class _Waiting:
    """What threads wait for, as it is when somebody asks."""

    what: str
    barrier: Barrier

    def __str__(self) -> str:
        return f"{self.what} of the {self.barrier.state}"


def _ordered(block: Block, threads: Threads, place: int) -> Barrier:
    """The mbarrier, which these threads have to know of: somebody made it, and they have waited for that."""
    barrier = barrier_at(block, place)
    ordering_of(block).check_known(np.unique(threads.index // 32), place)
    return barrier


_DECODERS = {
    "init": _init, "inval": _inval, "arrive": _arrive, "expect_tx": _expect, "test_wait": _wait, "try_wait": _wait,
}  # fmt: skip
