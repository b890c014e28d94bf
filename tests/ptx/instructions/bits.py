"""Instructions on bits, comparisons and choices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tests.ptx.block import Block
from tests.ptx.instructions.arithmetic import computed, flush, from_half, halves, is_half
from tests.ptx.operands import reader, writer
from tests.ptx.operations import Run, operation
from tests.ptx.syntax import Immediate, Instruction, Pair, Register, size_of
from tests.ptx.threads import Threads


@operation("and", "or", "xor")
def _bitwise(instruction: Instruction) -> Run:
    ufunc = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[instruction.opcode]
    return computed(instruction, ufunc, (instruction.type,) * 2, instruction.type, into=True)


@operation("not")
def _not(instruction: Instruction) -> Run:
    return computed(instruction, np.invert, (instruction.type,), instruction.type)


@operation("cnot")
def _cnot(instruction: Instruction) -> Run:
    return computed(instruction, lambda a: (a == 0).astype(a.dtype), (instruction.type,), instruction.type)


@operation("shl", "shr")
def _shift(instruction: Instruction) -> Run:
    """Amounts beyond the width shift everything out; shr.s leaves the sign."""
    name, amount = instruction.type, instruction.operands[2]
    bits, left = 8 * size_of(name), instruction.opcode == "shl"
    ufunc = np.left_shift if left else np.right_shift
    if isinstance(amount, Immediate) and 0 <= amount.value < bits:
        return computed(instruction, ufunc, (name, name), name, into=True)

    def shift(a: NDArray, by: NDArray) -> NDArray:
        inside = np.minimum(by, np.uint32(bits - 1)).astype(a.dtype)
        shifted = ufunc(a, inside)
        if left or name[0] != "s":
            return np.where(by < bits, shifted, a.dtype.type(0))
        return shifted

    return computed(instruction, shift, (name, "u32"), name)


@operation("shf")
def _funnel(instruction: Instruction) -> Run:
    left, clamps = instruction.has("l"), instruction.has("clamp")

    def funnel(low: NDArray, high: NDArray, by: NDArray) -> NDArray:
        amount = (np.minimum(by, np.uint32(32)) if clamps else by & np.uint32(31)).astype(np.uint64)
        both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
        moved = (both << amount) >> np.uint64(32) if left else both >> amount
        if left:  # by 32: the lower word, though bits above it are lost on the way
            moved = np.where(amount == 32, low, moved)
        return moved.astype(np.uint32)

    return computed(instruction, funnel, ("u32",) * 3, "u32")


@operation("bfe")
def _extract(instruction: Instruction) -> Run:
    name = instruction.type
    bits, unsigned = 8 * size_of(name), np.dtype(f"u{size_of(name)}")

    def extract(a: NDArray, begin: NDArray, length: NDArray) -> NDArray:
        begin, length = (begin & np.uint32(255)).astype(np.int64), (length & np.uint32(255)).astype(np.int64)
        amount = np.minimum(begin, bits - 1)
        moved = np.where(
            begin < bits, a >> amount.astype(a.dtype), a >> a.dtype.type(bits - 1) if name[0] == "s" else 0
        )
        kept = np.clip(np.minimum(length, bits - begin) if name[0] == "s" else length, 0, bits)
        mask = np.where(kept < bits, (np.uint64(1) << np.minimum(kept, 63).astype(np.uint64)) - np.uint64(1),
                        np.uint64(2**64 - 1)).astype(unsigned)  # fmt: skip
        found = moved.astype(a.dtype).view(unsigned) & mask
        if name[0] == "s":
            at = np.clip(np.minimum(begin + length - 1, bits - 1), 0, bits - 1)
            sign = ((a >> at.astype(a.dtype)) & a.dtype.type(1)).astype(bool) & (length > 0)
            found = np.where(sign, found | ~mask, found)
        return found.view(a.dtype)

    return computed(instruction, extract, (name, "u32", "u32"), name)


@operation("bfi")
def _insert(instruction: Instruction) -> Run:
    name = instruction.type
    bits = 8 * size_of(name)

    def insert(a: NDArray, b: NDArray, begin: NDArray, length: NDArray) -> NDArray:
        begin, length = (begin & np.uint32(255)).astype(np.uint64), (length & np.uint32(255)).astype(np.uint64)
        one = np.uint64(1)
        ones = np.where(length < 64, (one << np.minimum(length, np.uint64(63))) - one, np.uint64(2**64 - 1))
        start = np.minimum(begin, np.uint64(63))
        mask = np.where(begin < bits, ones << start, np.uint64(0))
        return ((b.astype(np.uint64) & ~mask) | ((a.astype(np.uint64) << start) & mask)).astype(b.dtype)

    return computed(instruction, insert, (name, name, "u32", "u32"), name)


@operation("popc")
def _popc(instruction: Instruction) -> Run:
    return computed(instruction, lambda a: np.bitwise_count(a).astype(np.uint32), (instruction.type,), "u32")


@operation("clz")
def _clz(instruction: Instruction) -> Run:
    bits = 8 * size_of(instruction.type)
    return computed(instruction, lambda a: (bits - _length(a)).astype(np.uint32), (instruction.type,), "u32")


def _length(values: NDArray) -> NDArray[np.int64]:
    """Bits up to the highest one."""
    length = np.zeros(values.shape, np.int64)
    rest = values.astype(np.uint64)
    for step in (32, 16, 8, 4, 2, 1):
        some = rest >= np.uint64(1 << step)
        length += some * step
        rest = np.where(some, rest >> np.uint64(step), rest)
    return length + (rest > 0)


@operation("bfind")
def _bfind(instruction: Instruction) -> Run:
    """The highest bit that differs from the sign; -1 where there is none."""
    name = instruction.type
    unsigned = np.dtype(f"u{size_of(name)}")

    def find(a: NDArray) -> NDArray:
        other = np.where(a < 0, ~a, a).astype(unsigned) if name[0] == "s" else a
        top = _length(other) - 1
        if instruction.has("shiftamt"):
            top = np.where(top < 0, -1, 8 * size_of(name) - 1 - top)
        return top.astype(np.int32).view(np.uint32)

    return computed(instruction, find, (name,), "u32")


@operation("brev")
def _brev(instruction: Instruction) -> Run:
    size = size_of(instruction.type)

    def reverse(a: NDArray) -> NDArray:
        data = np.unpackbits(np.ascontiguousarray(a).view(np.uint8).reshape(-1, size)[:, ::-1], axis=1)
        return np.packbits(data[:, ::-1], axis=1)[:, ::-1].copy().view(f"u{size}")[:, 0]

    return computed(instruction, reverse, (instruction.type,), instruction.type)


@operation("prmt")
def _permute(instruction: Instruction) -> Run:
    if instruction.modifiers != ("b32",):
        raise KeyError(instruction.modifiers)

    def permute(a: NDArray, b: NDArray, select: NDArray) -> NDArray:
        a, b, select = np.broadcast_arrays(a, b, select)
        data = np.stack([a, b], 1).view(np.uint8)  # [n, 8]
        result = np.empty((len(a), 4), np.uint8)
        rows = np.arange(len(a))
        for place in range(4):
            code = (select >> np.uint32(4 * place)) & np.uint32(15)
            chosen = data[rows, code & 7]
            result[:, place] = np.where(code & 8, np.where(chosen & 128, 255, 0), chosen)
        return result.view(np.uint32)[:, 0]

    return computed(instruction, permute, ("u32",) * 3, "u32")


@operation("lop3")
def _lop3(instruction: Instruction) -> Run:
    table = instruction.operands[4]
    assert isinstance(table, Immediate)

    def lop3(a: NDArray, b: NDArray, c: NDArray, _: NDArray) -> NDArray:
        result = np.zeros_like(a | b | c)
        for case in range(8):
            if table.value >> case & 1:
                result |= (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
        return result

    return computed(instruction, lop3, ("u32",) * 4, "u32")


# -- comparisons and choices

_COMPARE: dict[str, Callable[..., NDArray]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
_OPPOSITE = {"equ": "ne", "neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}


def _compare(name: str, floats: bool) -> Callable[[NDArray, NDArray], NDArray]:
    """The comparison of that name; of floats, ne is false and the ...u are true where one is NaN."""
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name in _OPPOSITE:
        opposite = _compare(_OPPOSITE[name], floats)
        return lambda a, b: ~opposite(a, b)
    if name == "ne" and floats:
        return lambda a, b: (a < b) | (a > b)
    return _COMPARE[name]


@operation("setp")
def _setp(instruction: Instruction) -> Run:
    """p = a cmp b, or p|q: q is the opposite (of packed halves: the comparison of the upper ones); or combined with a
    third, a predicate."""
    name, words = instruction.type, [each for each in instruction.modifiers if each != "ftz"]
    half, packed = is_half(name), name.endswith("x2")
    compare = _compare(words[0], half or name[0] == "f")
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[words[1]] if len(words) == 3 else None
    destination, a, b, *third = instruction.operands
    storage = ("u32" if packed else "u16") if half else name
    first, second = reader(instruction, a, storage), reader(instruction, b, storage)
    other = reader(instruction, third[0], "pred") if third else None
    pair = isinstance(destination, Pair)
    write = writer(instruction, destination.first if isinstance(destination, Pair) else destination, "pred")
    write_second = writer(instruction, destination.second, "pred") if isinstance(destination, Pair) else None
    flushes = "ftz" in instruction.modifiers
    if not (half or combine or pair or flushes) and isinstance(destination, Register):
        row = destination.index

        def plain(block: Block, threads: Threads) -> None:
            if threads.together:
                threads.pred[row][:] = compare(first(threads), second(threads))
            else:
                write(threads, compare(first(threads), second(threads)))

        return plain

    def run(block: Block, threads: Threads) -> None:
        x, y = first(threads), second(threads)
        if half:
            x, y = (from_half(halves(each) if packed else each, name) for each in (x, y))
        if flushes:
            x, y = flush(x), flush(y)
        found = compare(x, y)
        if packed:
            write(threads, found[:, 0])
            if write_second:
                write_second(threads, found[:, 1])
            return
        opposite = ~found
        if combine and other:
            found, opposite = combine(found, other(threads)), combine(opposite, other(threads))
        write(threads, found)
        if write_second:
            write_second(threads, opposite)

    return run


@operation("set")
def _set(instruction: Instruction) -> Run:
    *_, result, name = instruction.modifiers
    compare = _compare(instruction.modifiers[0], name[0] == "f")
    if is_half(name) or is_half(result) or len(instruction.operands) != 3:
        raise KeyError(name)
    true = 1.0 if result == "f32" else -1

    def choose(a: NDArray, b: NDArray) -> NDArray:
        return (
            np.where(compare(a, b), true, 0)
            .astype(np.float32 if result == "f32" else np.int64)
            .astype({"f32": np.float32, "u32": np.uint32, "s32": np.int32}[result])
        )

    return computed(instruction, choose, (name, name), result)


@operation("selp")
def _selp(instruction: Instruction) -> Run:
    name = instruction.type
    return computed(instruction, lambda a, b, p: np.where(p, a, b), (name, name, "pred"), name)


@operation("slct")
def _slct(instruction: Instruction) -> Run:
    *_, name, condition = instruction.modifiers
    return computed(instruction, lambda a, b, c: np.where(c >= 0, a, b), (name, name, condition), name)
