"""Instructions that load and store, also matrices of a warp (ldmatrix, stmatrix), and cvta."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tests.ptx.block import Block
from tests.ptx.instructions.lanes import meet
from tests.ptx.operands import addresses, elements, reader, writer
from tests.ptx.operations import Run, operation
from tests.ptx.spaces import PARAMETER_WINDOW, SHARED_WINDOW, Space
from tests.ptx.syntax import Address, Instruction, Symbol, size_of
from tests.ptx.threads import WARP, Threads, full

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


def _chunks(count: int, size: int) -> int:
    """Elements that are moved together: 16 bytes at most."""
    return min(count, 16 // size)


@operation("ld", "ldu")
def _load(instruction: Instruction) -> Run:
    space, name, count = _access(instruction)
    destination, source = instruction.operands
    size, targets = size_of(name), elements(destination)
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
    size, sources = size_of(name), elements(source)
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
    writes = [writer(instruction, each, "u32") for each in elements(destination)]
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
    reads = [reader(instruction, each, "u32") for each in elements(source)]
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
