"""Instructions that load and store, that move values among the lanes of a warp, and that wait for other warps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.ptx.machine import (
    PARAMETER_WINDOW,
    SHARED_WINDOW,
    WARP,
    Block,
    Run,
    Threads,
    addresses,
    full,
    operation,
    reader,
    writer,
)  # fmt: skip
from tests.ptx.parse import (
    Address,
    Immediate,
    Instruction,
    Operand,
    Pair,
    PTXError,
    Register,
    Sink,
    Symbol,
    Vector,
    size_of,
)
from tests.ptx.spaces import Space

_SPACES = {"global": "global", "shared": "shared", "shared::cta": "shared", "param": "param", "param::entry": "param",
           "const": "global"}  # fmt: skip


def space_of(block: Block, name: str, places: NDArray[np.uint64]) -> tuple[Space, NDArray[np.uint64]]:
    """The memory of "global", "shared" or "param" and the addresses in it; of "" (generic): by the first address."""
    if not name:
        first = int(places[0])
        name = "param" if first >= PARAMETER_WINDOW else "shared" if first >= SHARED_WINDOW else "global"
        if name == "shared":
            places = places - np.uint64(SHARED_WINDOW)
    if name == "shared":
        return block.shared_space, places
    if name == "param":
        return block.machine.parameters, places & np.uint64(PARAMETER_WINDOW - 1)
    return block.memory, places


def _access(instruction: Instruction) -> tuple[str, str, int]:
    """Space, type of an element, and how many."""
    space = next((_SPACES[word] for word in instruction.modifiers if word in _SPACES), "")
    count = next((int(word[1:]) for word in instruction.modifiers if word in ("v2", "v4", "v8")), 1)
    if any(word.startswith("shared::") and word not in _SPACES for word in instruction.modifiers):
        raise KeyError("shared memory of another block")
    return space, instruction.type, count


def _elements(operand: Operand) -> tuple[Operand, ...]:
    return operand.elements if isinstance(operand, Vector) else (operand,)


def _chunks(count: int, size: int) -> int:
    """Elements that are moved together: 16 bytes at most."""
    return min(count, 16 // size)


@operation("ld", "ldu")
def _load(instruction: Instruction) -> Run:
    space, name, count = _access(instruction)
    destination, source = instruction.operands
    size, targets = size_of(name), _elements(destination)
    if len(targets) != count or size > 8:
        raise KeyError(name)
    name = name if name[0] == "s" else f"u{8 * size}"
    writes = [writer(instruction, each, name) for each in targets]
    dtype = np.dtype(f"{'i' if name[0] == 's' else 'u'}{size}")
    where, step = addresses(instruction, source), _chunks(count, size)
    constant = space == "param" and isinstance(source, Address) and isinstance(source.base, Symbol)

    def run(block: Block, threads: Threads) -> None:
        places = where(threads)
        if constant:  # one value for all
            places = places[:1]
        memory, places = space_of(block, space, places)
        for begin in range(0, count, step):
            at = places + np.uint64(begin * size) if begin else places
            values = memory.load(at, size * step).view(dtype)
            if step == 1:
                writes[begin](threads, values)
            else:
                for place in range(step):
                    writes[begin + place](threads, values[place::step])
        if memory is block.shared_space:
            block.read_shared(threads, places, size * count)

    return run


@operation("st")
def _store(instruction: Instruction) -> Run:
    space, name, count = _access(instruction)
    destination, source = instruction.operands
    size, sources = size_of(name), _elements(source)
    if len(sources) != count or size > 8:
        raise KeyError(name)
    reads = [reader(instruction, each, f"u{8 * size}") for each in sources]
    dtype, items = np.dtype(f"u{size}"), {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}
    where, step = addresses(instruction, destination), _chunks(count, size)

    def run(block: Block, threads: Threads) -> None:
        memory, places = space_of(block, space, where(threads))
        for begin in range(0, count, step):
            at = places + np.uint64(begin * size) if begin else places
            if step == 1:
                memory.store(at, size, reads[begin](threads))
            else:
                values = np.empty((threads.count, step), dtype)
                for place in range(step):
                    values[:, place] = reads[begin + place](threads)
                memory.store(at, size * step, values.view(items[size * step])[:, 0])
        if memory is block.shared_space:
            block.written_shared(threads, places, size * count)

    return run


@operation("cvta")
def _cvta(instruction: Instruction) -> Run:
    """Shared memory and parameters have windows in generic space; global addresses are generic ones."""
    destination, source = instruction.operands
    name = instruction.type
    write = writer(instruction, destination, name)
    read = reader(instruction, source, name)
    inward = instruction.has("to")
    shift = SHARED_WINDOW if any(each.startswith("shared") for each in instruction.modifiers) else 0
    if instruction.has("local"):
        raise KeyError("local")
    delta = np.array([(-shift if inward else shift) % 2**64], np.uint64)

    def run(block: Block, threads: Threads) -> None:
        values = read(threads)
        write(threads, values + delta if shift else values)

    return run


@operation("prefetch", "prefetchu", "membar", "griddepcontrol", "nanosleep", "applypriority", "discard")
def _nothing(instruction: Instruction) -> Run:
    """Nothing that a value depends on."""
    return lambda block, threads: None


@operation("trap", "brkpt")
def _trap(instruction: Instruction) -> Run:
    def run(block: Block, threads: Threads) -> None:
        raise PTXError(f"threads {threads.index.tolist()[:4]}... trap")

    return run


# -- lanes of a warp


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
        bits = [np.array([each.value & 0xFFFFFFFF]) for each in (by, clamp)]
        fixed = lanes(*bits, np.arange(WARP))

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


def _members(threads: Threads, mask: NDArray) -> NDArray[np.bool_]:
    """Whether each thread's lane is in its mask."""
    return (full(mask, threads) >> (threads.index % WARP).astype(np.uint32) & np.uint32(1)).astype(bool)


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


def _matrix_form(instruction: Instruction) -> tuple[int, bool]:
    words = set(instruction.modifiers)
    if not {"m8n8", "b16"} <= words:
        raise KeyError("only m8n8 of b16")
    return next(int(word[1]) for word in words if word in ("x1", "x2", "x4")), "trans" in words


@operation("ldmatrix")
def _ldmatrix(instruction: Instruction) -> Run:
    """Matrix j comes from the rows that lanes 8 j to 8 j + 7 point to; lane l gets row l / 4, elements l % 4 * 2."""
    count, transposed = _matrix_form(instruction)
    destination, source = instruction.operands
    writes = [writer(instruction, each, "u32") for each in _elements(destination)]
    where = addresses(instruction, source)
    if len(writes) != count:
        raise KeyError(count)

    def run(block: Block, threads: Threads) -> None:
        meet(instruction, block, threads)
        rows = where(threads).reshape(-1, WARP)[:, : 8 * count]
        data = block.shared_space.load(rows.ravel(), 16).view(np.uint32).reshape(-1, count, WARP)
        pointing = threads if count == 4 else threads.where(threads.index % WARP < 8 * count)
        block.read_shared(pointing, rows.ravel(), 16)
        if transposed:
            halves = data.view(np.uint16).reshape(-1, count, 8, 8).swapaxes(2, 3)
            data = np.ascontiguousarray(halves).view(np.uint32).reshape(-1, count, WARP)
        for place, write in enumerate(writes):
            write(threads, data[:, place].ravel())

    return run


@operation("stmatrix")
def _stmatrix(instruction: Instruction) -> Run:
    """The opposite of ldmatrix."""
    count, transposed = _matrix_form(instruction)
    destination, source = instruction.operands
    reads = [reader(instruction, each, "u32") for each in _elements(source)]
    where = addresses(instruction, destination)
    if len(reads) != count:
        raise KeyError(count)

    def run(block: Block, threads: Threads) -> None:
        meet(instruction, block, threads)
        rows = where(threads).reshape(-1, WARP)[:, : 8 * count]
        data = np.stack([full(read(threads), threads).reshape(-1, WARP) for read in reads], 1)
        if transposed:
            halves = data.view(np.uint16).reshape(-1, count, 8, 8).swapaxes(2, 3)
            data = np.ascontiguousarray(halves)
        data = np.ascontiguousarray(data).view(np.complex128).ravel()
        block.shared_space.store(rows.ravel(), 16, data)
        pointing = threads if count == 4 else threads.where(threads.index % WARP < 8 * count)
        block.written_shared(pointing, rows.ravel(), 16)

    return run


# -- barriers


@operation("bar", "barrier")
def _barrier(instruction: Instruction) -> Run:
    """Named barriers, counted by threads. All threads of a block come where no count is given."""
    words = [each for each in instruction.modifiers if each not in ("cta", "aligned")]
    if words[0] == "cluster":  # clusters are of one block
        return lambda block, threads: None
    if words[0] == "warp":
        masks = reader(instruction, instruction.operands[0], "u32")
        return lambda block, threads: meet(instruction, block, threads, masks(threads))
    if words[0] not in ("sync", "arrive") or len(words) > 1:
        raise KeyError(words[0])
    names = reader(instruction, instruction.operands[0], "u32")
    counts = reader(instruction, instruction.operands[1], "u32") if len(instruction.operands) > 1 else None
    waits_too = words[0] == "sync"

    def run(block: Block, threads: Threads) -> None:
        numbers, waits = names(threads), []
        expected = counts(threads) if counts else np.array([block.size])
        barriers = block.state.setdefault("barriers", {})
        for number in np.unique(numbers).tolist():
            here = threads if len(numbers) == 1 or (numbers == number).all() else threads.where(numbers == number)
            limit = int(expected[0] if len(expected) == 1 else expected[numbers == number][0])
            if number > 15 or limit % WARP or limit > block.size:
                raise PTXError(f"barrier {number} of {limit} threads, in a block of {block.size}")
            state = barriers.setdefault(number, {"arrived": [], "count": 0, "round": 0, "limit": limit})
            if state["count"] and state["limit"] != limit:
                raise PTXError(f"barrier {number} of {limit} threads, which others take for one of {state['limit']}")
            state["limit"] = limit
            state["arrived"].append(here.index)
            state["count"] += here.count
            if state["count"] > limit:
                raise PTXError(f"{state['count']} threads come to barrier {number} of {limit}")
            if state["count"] == limit:
                everyone = here if here.count == limit else block.threads(np.sort(np.concatenate(state["arrived"])))
                state["arrived"], state["count"], state["round"] = [], 0, state["round"] + 1
                for call in block.on_barrier:
                    call(everyone)
            elif waits_too:

                def ready(state: dict[str, Any] = state, begun: int = state["round"]) -> bool:
                    return state["round"] != begun

                waits.append((here, ready, f"for barrier {number} ({state['count']} of {limit} threads)"))
        block.wait(instruction, waits, again=False)

    return run
