"""Instructions that copy asynchronously: cp.async, and bulk copies with and without tensor maps.

A copy that completes early is done when it is issued; a late one when somebody waits for it: cp.async at its wait, a
bulk store at the wait for its group, a bulk load when no warp can go on without it. Its sources are read then, and what
a load will write holds 0xFF bytes from the issue on. A bulk store is in global memory once its group is waited for
without `.read`, or when the block ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from tests.ptx.block import BLOCK_HOOKS, Block
from tests.ptx.instructions.async_copies import BulkGroups, BulkStore, Groups, ThreadCopies
from tests.ptx.instructions.mbarrier import barrier_at, shared_places
from tests.ptx.instructions.ordering import ProtocolError, ordering_of
from tests.ptx.instructions.tensor_map import TensorMap
from tests.ptx.operands import addresses, reader
from tests.ptx.operations import Run, operation
from tests.ptx.syntax import Address, Immediate, Instruction
from tests.ptx.threads import Threads, full

_FEATURES = ("im2col", "im2col::w", "multicast::cluster", "tile::gather4", "tile::scatter4", "cp_mask")


class _Flying:
    """What a block has in flight: cp.async of its threads, and the bulk stores of each that has issued any."""

    def __init__(self, block: Block) -> None:
        self.groups = Groups(block.size)
        self.stores: dict[int, BulkGroups] = {}


def _begin(block: Block) -> None:
    flying = block.state["copies"] = _Flying(block)

    def finish() -> None:
        for groups in flying.stores.values():
            for store in groups.left():
                store.write(store.take())

    block.at_exit.append(finish)


BLOCK_HOOKS.append(_begin)


def _flying(block: Block) -> _Flying:
    found: _Flying = block.state["copies"]
    return found


@operation("cp")
def _cp(instruction: Instruction) -> Run:
    """cp.async, its groups, and bulk copies."""
    for feature in _FEATURES:
        if instruction.has(feature):
            raise instruction.error(f"{feature} is not modelled")
    if not instruction.has("async") or instruction.has("reduce"):
        raise instruction.error("not modelled")
    if instruction.has("bulk"):
        if instruction.has("commit_group"):
            return _commit_bulk
        if instruction.has("wait_group"):
            return partial(_wait_bulk, _count(instruction), instruction.has("read"))
        return _BulkCopy(instruction).run
    if instruction.has("commit_group"):
        return _commit
    if instruction.has("wait_group"):
        return partial(_wait, _count(instruction))
    if instruction.has("wait_all"):
        return partial(_wait, None)
    return _arrival(instruction) if instruction.has("mbarrier") else _copy(instruction)


def _count(instruction: Instruction) -> int:
    (operand,) = instruction.operands
    if not isinstance(operand, Immediate):
        raise instruction.error("a number of groups is needed")
    return operand.value


def _copy(instruction: Instruction) -> Run:
    target, source, length, *rest = instruction.operands
    size = length.value if isinstance(length, Immediate) else 0
    if size not in (4, 8, 16):
        raise instruction.error("copies of 4, 8 or 16 bytes are possible")
    hinted = instruction.has("L2::cache_hint")
    taken_of = reader(instruction, rest[0], "u32") if len(rest) > hinted else None
    targets_of, sources_of = shared_places(instruction, target), addresses(instruction, source)

    def run(block: Block, threads: Threads) -> None:
        flying, numbers = _flying(block).groups, threads.index
        targets, sources = targets_of(threads), sources_of(threads).copy()
        if (targets % size).any() or targets.max() + size > len(block.shared):
            raise ProtocolError(f"shared address {targets.max()} is beyond the end, or {size} does not divide it")
        taken = np.full(threads.count, size)
        if taken_of is not None:
            taken[:] = full(taken_of(threads), threads)
            if (taken > size).any():
                raise ProtocolError(f"{taken.max()} bytes are to be taken of {size}")
        group, everybody = flying.committed[numbers], np.ones(threads.count, bool)
        copies = ThreadCopies(numbers, targets, sources, taken, size, group, everybody)
        ordering_of(block).starts_copy(numbers // 32, targets, size)
        flying.flying.append(copies)
        if block.late:
            block.shared[targets[:, None] + np.arange(size)] = 0xFF
        else:
            copies.run(everybody, partial(_load, block), block.shared)

    return run


def _load(block: Block, places: np.ndarray, size: int) -> np.ndarray:
    """Bytes [count, size] of global memory."""
    item = 16 if size == 16 else size & -size
    steps = [block.memory.load(places + np.uint64(step), item) for step in range(0, size, item)]
    return np.stack(steps, 1).view(np.uint8).reshape(len(places), size)


def _commit(block: Block, threads: Threads) -> None:
    _flying(block).groups.committed[threads.index] += 1


def _wait(most: int | None, block: Block, threads: Threads) -> None:
    _finish_copies(block, threads.index, most)


def _finish_copies(block: Block, numbers: np.ndarray, most: int | None) -> None:
    """These threads have at most so many groups of copies in flight (None: no copy at all)."""
    for copies, which in _flying(block).groups.due(numbers, most):
        if block.late:
            copies.run(which, partial(_load, block), block.shared)
        ordering_of(block).ends_copy(copies.threads[which] // 32, copies.targets[which], copies.size)


def _arrival(instruction: Instruction) -> Run:
    """cp.async.mbarrier.arrive: with .noinc the arrivals are among those that the mbarrier was made for."""
    places_of = shared_places(instruction, instruction.operands[0])

    def run(block: Block, threads: Threads) -> None:
        places = places_of(threads)
        for place in np.unique(places):
            numbers = threads.index[places == place]
            barrier = barrier_at(block, int(place))
            if not instruction.has("noinc"):
                barrier.pending += len(numbers)

            def arrive(numbers: np.ndarray = numbers, place: int = int(place)) -> None:
                _finish_copies(block, numbers, None)
                arrived = barrier_at(block, place)
                ordering_of(block).release(np.unique(numbers // 32), arrived.released)
                arrived.arrive(len(numbers))

            if block.late:
                block.pending.append(arrive)
            else:
                arrive()

    return run


class _BulkCopy:
    """cp.async.bulk and cp.async.bulk.tensor, either way between global and shared memory."""

    def __init__(self, instruction: Instruction) -> None:
        self.instruction = instruction
        target, source, *rest = instruction.operands
        self.loads = instruction.modifiers.index("global") > min(
            place for place, name in enumerate(instruction.modifiers) if name.startswith("shared")
        )
        self.outside, inside = (source, target) if self.loads else (target, source)
        self.place_of = shared_places(instruction, inside)
        self.tensor = instruction.has("tensor")
        if not self.tensor:
            self.size_of = reader(instruction, rest.pop(0), "u32")
        if self.loads:
            self.barrier_of = shared_places(instruction, rest[0])
        elif not instruction.has("bulk_group"):
            raise instruction.error("not modelled: stores in bulk groups are")
        if not isinstance(self.outside, Address):
            raise instruction.error("an address is needed")
        self.coordinates = [reader(instruction, each, "s32") for each in self.outside.coordinates]
        self.outside_of = addresses(instruction, Address(self.outside.base, self.outside.offset))

    def run(self, block: Block, threads: Threads) -> None:
        for number in threads.index:
            self._run(block, block.threads(np.array([number])))

    def _run(self, block: Block, thread: Threads) -> None:
        place, outside = int(self.place_of(thread)[0]), int(self.outside_of(thread)[0])
        read: Callable[[], np.ndarray]
        write: Callable[[np.ndarray], None]
        if self.tensor:
            start = [int(get(thread)[0]) for get in self.coordinates]
            tensor_map = self._map(block, outside, start)
            pieces, size = tensor_map.places(place), tensor_map.bytes_in_box
            read = partial(tensor_map.load, block.memory.bytes, start)
            write = partial(tensor_map.store, block.memory.bytes, start)
        else:
            size = int(self.size_of(thread)[0])
            if size % 16 or place % 16 or outside % 16:
                raise ProtocolError(f"{size} bytes between {outside:#x} and {place}: 16 has to divide each of these")
            pieces = place // 16 + np.arange(size // 16)
            read, write = partial(block.memory.bytes, outside, size), partial(_put, block, outside, size)
        shared = block.shared.reshape(-1, 16)
        if pieces.max(initial=0) >= len(shared):
            raise ProtocolError(f"{size} bytes at {place} reach beyond shared memory, which has {len(block.shared)}")
        if self.loads:
            self._load(block, thread, read, pieces, size)
            return
        ordering_of(block).starts_async_read([thread.low // 32], pieces)
        store = BulkStore(lambda: shared[pieces].reshape(-1), write, pieces)
        _flying(block).stores.setdefault(thread.low, BulkGroups()).open.append(store)
        if not block.late:
            store.take()

    def _map(self, block: Block, address: int, start: Sequence[int]) -> TensorMap:
        found = block.machine.parameter(address)
        if not isinstance(found, TensorMap):
            raise ProtocolError(f"the parameter at {address:#x} is no tensor map")
        if not self.instruction.has(f"{len(start)}d") or len(start) != len(found.shape):
            raise ProtocolError(f"{len(start)} coordinates for a tensor map of {len(found.shape)} dimensions")
        return found

    def _load(
        self, block: Block, thread: Threads, read: Callable[[], np.ndarray], pieces: np.ndarray, size: int
    ) -> None:
        place = int(self.barrier_of(thread)[0])
        barrier_at(block, place)
        shared, ordering = block.shared.reshape(-1, 16), ordering_of(block)
        time = ordering.starts_bulk_load(thread.low // 32, pieces, place)

        def finish() -> None:
            if not block.strands and block.late:
                raise self.instruction.error("the block has ended before these bytes have come")
            shared[pieces] = read().reshape(-1, 16)
            barrier = barrier_at(block, place)
            ordering.ends_bulk_load(place, time, barrier.released)
            barrier.expect(-size)

        if block.late:
            shared[pieces] = 0xFF
            block.pending.append(finish)
        else:
            finish()


def _put(block: Block, address: int, size: int, data: np.ndarray) -> None:
    block.memory.bytes(address, size)[:] = data


def _commit_bulk(block: Block, threads: Threads) -> None:
    stores = _flying(block).stores
    for number in stores.keys() & set(threads.index.tolist()):
        stores[number].commit()


def _wait_bulk(most: int, reading: bool, block: Block, threads: Threads) -> None:
    stores = _flying(block).stores
    for number in sorted(stores.keys() & set(threads.index.tolist())):
        groups = stores[number]
        count = max(0, len(groups.groups) - most)
        for store in [store for group in groups.groups[:count] for store in group]:
            data = store.take()
            if not store.released:
                store.released = True
                ordering_of(block).ends_async_read([number // 32], store.pieces)
            if not reading:
                store.write(data)
        if not reading:
            groups.groups = groups.groups[count:]


@operation("fence")
def _fence(instruction: Instruction) -> Run:
    """fence.proxy.async orders the generic proxy before the async one; other fences order memory among threads, which
    run here one after the other anyway."""
    between = instruction.has("proxy") and any(each.startswith("async") for each in instruction.modifiers)

    def run(block: Block, threads: Threads) -> None:
        if between:
            ordering_of(block).fence(np.unique(threads.index // 32))

    return run
