"""Instructions that move values among the lanes of a warp, and that its lanes meet at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.ptx.block import Block
from tests.ptx.operands import reader, writer
from tests.ptx.operations import Run, operation
from tests.ptx.syntax import Immediate, Instruction, Operand, Pair, Register, Sink, size_of
from tests.ptx.threads import WARP, Threads, full


def meet(instruction: Instruction, block: Block, threads: Threads, mask: NDArray | None = None) -> None:
    """Waits until every lane of the mask ([count] or [1], default all) of each warp is at this instruction."""
    if threads.whole:
        return
    waits: list[tuple[Threads, Callable[[], bool], str]] = []
    complete: list[tuple[Threads, Callable[[], bool], str]] = []  # these have to come again too: nothing is done yet
    for warp in threads.warps():
        wanted = 2**WARP - 1
        if mask is not None:
            wanted = int(mask[0] if len(mask) == 1 else mask[np.searchsorted(threads.index, warp.low)])
        first = warp.low // WARP * WARP
        lanes = {first + lane for lane in range(WARP) if wanted >> lane & 1}
        if not lanes <= set(warp.index.tolist()):

            def ready(lanes: set[int] = lanes) -> bool:
                here = [strand.threads.index.tolist() for strand in block.strands if strand.pc == instruction.index]
                return lanes <= {lane for each in here for lane in each}

            waits.append((warp, ready, f"for lanes of warp {first // WARP} to meet"))
        else:
            complete.append((warp, lambda: True, "for nothing"))
    block.wait(instruction, [*waits, *complete] if waits else [], again=True)


def _table(operand: Operand, block: Block, threads: Threads, read: Callable[[Threads], NDArray]) -> NDArray:
    """A register's row over the block, so that lanes can be looked up by thread."""
    if isinstance(operand, Register):
        return block.files[operand.file][operand.index]
    table = np.zeros(block.size, np.uint32)
    table[threads.select] = read(threads)
    return table


@operation("shfl")
def _shuffle(instruction: Instruction) -> Run:
    if not instruction.has("sync"):
        raise KeyError("shfl without sync")
    mode = instruction.modifiers[1]
    destination, source, by, clamp, mask = instruction.operands
    write = writer(instruction, destination.first if isinstance(destination, Pair) else destination, "u32")
    inside = writer(instruction, destination.second, "pred") if isinstance(destination, Pair) else None
    read = reader(instruction, source, "u32")
    amounts, clamps, masks = (reader(instruction, each, "u32") for each in (by, clamp, mask))

    def lanes(amount: NDArray, bound: NDArray, lane: NDArray) -> tuple[NDArray, NDArray]:
        """Which lane each reads, and whether that is in range."""
        amount, bound = amount.astype(np.int64) & 31, bound.astype(np.int64)
        segment, limit = bound >> 8 & 31, bound & 31
        highest = (lane & segment) | (limit & ~segment)
        at = {"up": lane - amount, "down": lane + amount, "bfly": lane ^ amount,
              "idx": (lane & segment) | (amount & ~segment)}[mode]  # fmt: skip
        there = at >= highest if mode == "up" else at <= highest
        return np.where(there, at, lane), there

    fixed = None
    if isinstance(by, Immediate) and isinstance(clamp, Immediate):
        amount, bound = (np.array([each.value & 0xFFFFFFFF]) for each in (by, clamp))
        fixed = lanes(amount, bound, np.arange(WARP))

    def run(block: Block, threads: Threads) -> None:
        if threads.whole and fixed:
            values = full(read(threads), threads).reshape(-1, WARP)
            write(threads, values.take(fixed[0], axis=1).ravel())
            if inside:
                inside(threads, np.tile(fixed[1], len(values)))
            return
        meet(instruction, block, threads, masks(threads))
        at, there = lanes(amounts(threads), clamps(threads), threads.index % WARP)
        values = _table(source, block, threads, read)[threads.index // WARP * WARP + at]
        write(threads, values)
        if inside:
            inside(threads, there)

    return run


def _by_warp(threads: Threads, values: NDArray, function: Callable[[NDArray, NDArray], Any]) -> NDArray:
    """function(values of a warp's threads, their lanes) for each warp, to each of its threads ([] or [of the warp])."""
    result = None
    warps = threads.index // WARP
    for warp in np.unique(warps):
        here = warps == warp
        found = np.asarray(function(values[here], threads.index[here] % WARP))
        if result is None:
            result = np.zeros(threads.count, found.dtype)
        result[here] = found
    assert result is not None
    return result


def _ballot(values: NDArray, lanes: NDArray) -> np.uint32:
    return np.uint32(sum(1 << int(lane) for lane in lanes[values.astype(bool)]))


@operation("vote")
def _vote(instruction: Instruction) -> Run:
    _, mode, name = instruction.modifiers
    destination, source, mask = instruction.operands
    read, masks = reader(instruction, source, "pred"), reader(instruction, mask, "u32")
    functions: dict[str, Callable[[NDArray, NDArray], Any]] = {
        "all": lambda values, lanes: values.all(), "any": lambda values, lanes: values.any(),
        "uni": lambda values, lanes: values.all() or not values.any(), "ballot": _ballot,
    }  # fmt: skip
    function, write = functions[mode], writer(instruction, destination, name)

    def run(block: Block, threads: Threads) -> None:
        meet(instruction, block, threads, masks(threads))
        write(threads, _by_warp(threads, full(read(threads), threads), function))

    return run


@operation("match")
def _match(instruction: Instruction) -> Run:
    if not instruction.has("any"):
        raise KeyError("match.all")
    destination, source, mask = instruction.operands
    write, masks = writer(instruction, destination, "u32"), reader(instruction, mask, "u32")
    read = reader(instruction, source, f"u{8 * size_of(instruction.modifiers[-1])}")

    def run(block: Block, threads: Threads) -> None:
        meet(instruction, block, threads, masks(threads))
        write(threads, _by_warp(threads, full(read(threads), threads), lambda values, lanes: np.array(
            [_ballot(values == each, lanes) for each in values], np.uint32)))  # fmt: skip

    return run


@operation("redux")
def _redux(instruction: Instruction) -> Run:
    """Over all lanes of the mask, which must be those that are there."""
    kind, name = instruction.modifiers[1], instruction.type
    ufunc = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
             "xor": np.bitwise_xor}[kind]  # fmt: skip
    destination, source, mask = instruction.operands
    read, masks, write = reader(instruction, source, name), reader(instruction, mask, "u32"), writer(
        instruction, destination, name)  # fmt: skip

    def run(block: Block, threads: Threads) -> None:
        meet(instruction, block, threads, masks(threads))
        values = full(read(threads), threads)
        if threads.whole:
            found = ufunc.reduce(values.reshape(-1, WARP), axis=1, dtype=values.dtype)
            write(threads, np.repeat(found, WARP))
        else:
            write(threads, _by_warp(threads, values, lambda v, lanes: ufunc.reduce(v, dtype=v.dtype)))

    return run


@operation("elect")
def _elect(instruction: Instruction) -> Run:
    """The lowest lane of the mask."""
    destination, mask = instruction.operands
    assert isinstance(destination, Pair)
    lane, chosen = writer(instruction, destination.first, "u32"), writer(instruction, destination.second, "pred")
    masks = reader(instruction, mask, "u32")

    def run(block: Block, threads: Threads) -> None:
        meet(instruction, block, threads, masks(threads))
        bits = full(masks(threads), threads).astype(np.int64)
        lowest = np.log2(bits & -bits).astype(np.uint32)
        if not isinstance(destination.first, Sink):
            lane(threads, lowest)
        chosen(threads, threads.index % WARP == lowest)

    return run


@operation("activemask")
def _activemask(instruction: Instruction) -> Run:
    write = writer(instruction, instruction.operands[0], "u32")
    return lambda block, threads: write(threads, _by_warp(threads, np.ones(threads.count, bool), _ballot))
