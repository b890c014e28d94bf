"""Instructions that compute: moves, conversions, integers, floats, comparisons, bits.

Floats are rounded as PTX says where it does (add, mul, fma, div.rn, sqrt.rn and conversions, to nearest even); fma of
float32 goes through float64: one rounding, but for sums within 2^-53 of the middle between two floats. What PTX
approximates (ex2, lg2, rcp.approx, div.full, tanh) is the float64 result rounded once: a GPU may differ in the last
bit.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.ptx.machine import Block, Run, Threads, operation, reader, writer
from tests.ptx.parse import Immediate, Instruction, Pair, Register, Vector, size_of

_TINY = np.float32(2.0**-126)
_NATIVE = {"b16": ("u16", "s16", "b16", "f16"), "b32": ("u32", "s32", "b32", "f32"),
           "b64": ("u64", "s64", "b64", "f64"), "pred": ("pred",)}  # fmt: skip
_SIGNLESS = {"b16": "u16", "b32": "u32", "b64": "u64"}


def computed(instruction: Instruction, function: Callable[..., Any], types: tuple[str, ...], result: str,
             into: bool = False) -> Run:  # fmt: skip
    """destination = function(sources of these types). `into`: the function is a ufunc that takes where to write."""
    destination, *sources = instruction.operands
    reads = [reader(instruction, each, type_name) for each, type_name in zip(sources, types, strict=True)]
    write = writer(instruction, destination, result)
    direct = into and isinstance(destination, Register) and result in _NATIVE[destination.file]
    if direct and len(reads) == 2:
        first, second = reads
        view, row = operator.attrgetter(_SIGNLESS.get(result, result)), destination.index

        def two(block: Block, threads: Threads) -> None:
            if threads.together:
                function(first(threads), second(threads), view(threads)[row])
            else:
                write(threads, function(first(threads), second(threads)))

        registers = [each for each in sources if isinstance(each, Register) and types[0] in _NATIVE[each.file]]
        if len(registers) == 2 and types[0] == types[1]:
            a, b, rows = registers[0].index, registers[1].index, operator.attrgetter(_SIGNLESS.get(types[0], types[0]))

            def rows_only(block: Block, threads: Threads) -> None:
                if threads.together:
                    table = rows(threads)
                    function(table[a], table[b], view(threads)[row])
                else:
                    write(threads, function(first(threads), second(threads)))

            return rows_only
        return two
    if len(reads) == 1:
        only = reads[0]
        return lambda block, threads: write(threads, function(only(threads)))
    if len(reads) == 2:
        first, second = reads
        return lambda block, threads: write(threads, function(first(threads), second(threads)))
    if len(reads) == 3:
        first, second, third = reads
        return lambda block, threads: write(threads, function(first(threads), second(threads), third(threads)))
    return lambda block, threads: write(threads, function(*(read(threads) for read in reads)))


# -- floats of 16 bits


def from_bf16(bits: NDArray) -> NDArray[np.float32]:
    """bf16 bits (uint16) as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: NDArray[np.float32], rounding: str = "rn") -> NDArray[np.uint16]:
    """The bits of float32 values rounded to nearest even ("rz": to zero); NaN becomes 0x7FFF."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits if rounding == "rz" else bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))
    return np.where(np.isnan(values), np.uint16(0x7FFF), (rounded >> 16).astype(np.uint16))


def from_half(bits: NDArray, kind: str) -> NDArray[np.float32]:
    """Bits of "bf16" or "f16" as float32."""
    return from_bf16(bits) if kind.startswith("bf16") else bits.astype(np.uint16).view(np.float16).astype(np.float32)


def to_half(values: NDArray, kind: str, rounding: str = "rn") -> NDArray[np.uint16]:
    """float32 values, or exact float64 ones, as bits of "bf16" or "f16"."""
    if kind.startswith("bf16"):
        return to_bf16(_odd(values) if values.dtype == np.float64 else values, rounding)
    if rounding == "rz":
        near = values.astype(np.float16)
        beyond = np.abs(near.astype(np.float64)) > np.abs(values)
        return near.view(np.uint16) - beyond.astype(np.uint16)
    bits = values.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), bits)


def _odd(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """float64 as float32 rounded to odd: a second rounding, to fewer bits, then goes as if it were the only one."""
    near = values.astype(np.float32)
    bits = near.view(np.uint32).copy()
    inexact = (near.astype(np.float64) != values) & np.isfinite(near)
    bits[inexact & (np.abs(near.astype(np.float64)) > np.abs(values))] -= 1
    bits[inexact] |= 1
    return bits.view(np.float32)


def _halves(bits: NDArray) -> NDArray[np.uint16]:
    """uint32 [n] as [n, 2]: lower half first."""
    return np.ascontiguousarray(bits).view(np.uint16).reshape(-1, 2)


def _is_half(type_name: str) -> bool:
    return type_name in ("f16", "bf16", "f16x2", "bf16x2")


def _half_operation(instruction: Instruction, function: Callable[..., NDArray]) -> Run:
    """Floats of 16 bits, one or two in a register: computed exactly enough in float64 and rounded once."""
    kind = instruction.type
    packed = kind.endswith("x2")

    def compute(*sources: NDArray) -> NDArray:
        wide = [from_half(_halves(each) if packed else each, kind).astype(np.float64) for each in sources]
        rounded = to_half(function(*wide), kind)
        return np.ascontiguousarray(rounded).view(np.uint32)[:, 0] if packed else rounded

    storage = "u32" if packed else "u16"
    return computed(instruction, compute, (storage,) * (len(instruction.operands) - 1), storage)


# -- float32 and float64


def flush(values: NDArray) -> NDArray:
    """.ftz: numbers too small for float32's normal form become zeros of their sign."""
    if values.dtype != np.float32:
        return values
    return np.where(np.abs(values) < _TINY, np.copysign(np.float32(0), values), values)


def _float_operation(instruction: Instruction, function: Callable[..., NDArray], ufunc: bool = False) -> Run:
    name = instruction.type
    for rounding in ("rz", "rm", "rp"):
        if instruction.has(rounding):
            raise KeyError(rounding)
    types = (name,) * (len(instruction.operands) - 1)
    if instruction.has("sat"):
        raise KeyError("sat")
    if instruction.has("ftz"):
        return computed(instruction, lambda *s: flush(function(*map(flush, s))), types, name)
    return computed(instruction, function, types, name, into=ufunc)


def _fma(a: NDArray, b: NDArray, c: NDArray) -> NDArray:
    if a.dtype == np.float64:
        return _fma64(a, b, c)
    return (np.multiply(a, b, dtype=np.float64) + c).astype(np.float32)


def _fma64(a: NDArray, b: NDArray, c: NDArray) -> NDArray[np.float64]:
    """One rounding, by numbers of two floats (Dekker): exact but where halves of the product underflow."""
    product = a * b
    high_a, high_b = a * 134217729.0, b * 134217729.0
    high_a, high_b = high_a - (high_a - a), high_b - (high_b - b)
    low_a, low_b = a - high_a, b - high_b
    rest = ((high_a * high_b - product) + high_a * low_b + low_a * high_b) + low_a * low_b
    total = product + c
    moved = total - product
    error = (product - (total - moved)) + (c - moved)
    result = total + (error + rest)
    return np.where(np.isfinite(result), result, total)


_FLOAT_UFUNCS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


@operation("add", "sub", "mul")
def _sum_or_product(instruction: Instruction) -> Run:
    ufunc, name = _FLOAT_UFUNCS[instruction.opcode], instruction.type
    if _is_half(name):
        return _half_operation(instruction, ufunc)
    if name[0] == "f":
        return _float_operation(instruction, ufunc, ufunc=True)
    if instruction.has("cc") or instruction.has("sat"):
        raise KeyError("cc or sat")
    if instruction.has("wide"):
        return computed(instruction, _wide(name), (name, name), _double(name))
    if instruction.has("hi"):
        return computed(instruction, _high(name), (name, name), name)
    return computed(instruction, ufunc, (name, name), name, into=True)


def _double(name: str) -> str:
    return f"{name[0]}{2 * 8 * size_of(name)}"


def _wide(name: str) -> Callable[..., NDArray]:
    dtype = np.dtype(f"{'i' if name[0] == 's' else 'u'}{2 * size_of(name)}")
    return lambda a, b: np.multiply(a, b, dtype=dtype)


def _high(name: str) -> Callable[..., NDArray]:
    bits = 8 * size_of(name)
    if bits < 64:
        wide = _wide(name)
        return lambda a, b: (wide(a, b) >> bits).astype(a.dtype)

    def high(a: NDArray, b: NDArray) -> NDArray:
        a, b = np.broadcast_arrays(a, b)
        top = [(int(x) * int(y)) >> 64 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
        return np.array([each & (2**64 - 1) for each in top], np.uint64).view(a.dtype)

    return high


@operation("mad")
def _mad(instruction: Instruction) -> Run:
    name = instruction.type
    if name[0] == "f":
        return _float_operation(instruction, _fma)
    if instruction.has("wide"):
        wide = _wide(name)
        return computed(instruction, lambda a, b, c: wide(a, b) + c, (name, name, _double(name)), _double(name))
    if instruction.has("hi"):
        high = _high(name)
        return computed(instruction, lambda a, b, c: high(a, b) + c, (name,) * 3, name)
    return computed(instruction, lambda a, b, c: a * b + c, (name,) * 3, name)


@operation("fma")
def _fused(instruction: Instruction) -> Run:
    if _is_half(instruction.type):
        return _half_operation(instruction, lambda a, b, c: a * b + c)
    return _float_operation(instruction, _fma)


@operation("min", "max")
def _extreme(instruction: Instruction) -> Run:
    """NaN only where .NaN says so, or where both are."""
    name, least = instruction.type, instruction.opcode == "min"
    strict = instruction.has("NaN")
    ufunc = (np.minimum if strict else np.fmin) if least else (np.maximum if strict else np.fmax)
    if _is_half(name):
        return _half_operation(instruction, ufunc)
    if name[0] == "f" and len(instruction.operands) == 4:  # of three
        return _float_operation(instruction, lambda a, b, c: ufunc(ufunc(a, b), c))
    if name[0] == "f":
        return _float_operation(instruction, _signed_zeros(ufunc, least))
    return computed(instruction, ufunc, (name, name), name, into=True)


def _signed_zeros(ufunc: Any, least: bool) -> Callable[..., NDArray]:
    """-0 is less than +0 in PTX; numpy takes either."""

    def extreme(a: NDArray, b: NDArray) -> NDArray:
        found = ufunc(a, b)
        zero = found == 0
        if np.count_nonzero(zero):
            negative = (np.signbit(a) | np.signbit(b)) if least else (np.signbit(a) & np.signbit(b))
            both = zero & (a == b)
            found = np.where(both, np.where(negative, -0.0, 0.0).astype(found.dtype), found)
        return found

    return extreme


@operation("div")
def _divide(instruction: Instruction) -> Run:
    name = instruction.type
    if name[0] == "f":
        return _float_operation(instruction, np.divide)
    if name[0] == "u":
        return computed(instruction, lambda a, b: np.where(b == 0, ~a, a // np.maximum(b, 1)), (name, name), name)
    return computed(instruction, lambda a, b: _truncated(a, b)[0], (name, name), name)


@operation("rem")
def _remainder(instruction: Instruction) -> Run:
    name = instruction.type
    if name[0] == "u":
        return computed(instruction, lambda a, b: np.where(b == 0, a, a % np.maximum(b, 1)), (name, name), name)
    return computed(instruction, lambda a, b: _truncated(a, b)[1], (name, name), name)


def _truncated(a: NDArray, b: NDArray) -> tuple[NDArray, NDArray]:
    """Quotient towards zero, and what it leaves."""
    rest = np.fmod(a, np.where(b == 0, b.dtype.type(1), b))
    rest = np.where(b == 0, a, rest)
    return np.where(b == 0, b.dtype.type(-1), (a - rest) // np.where(b == 0, b.dtype.type(1), b)), rest


def _rounded(function: Callable[[NDArray], NDArray]) -> Callable[[NDArray], NDArray]:
    return lambda a: function(a.astype(np.float64)).astype(a.dtype)


_FUNCTIONS: dict[str, Callable[[NDArray], NDArray]] = {
    "ex2": _rounded(np.exp2), "lg2": _rounded(np.log2), "rcp": _rounded(lambda a: 1.0 / a),
    "rsqrt": _rounded(lambda a: 1.0 / np.sqrt(a)), "sqrt": np.sqrt, "tanh": _rounded(np.tanh),
    "sin": _rounded(np.sin), "cos": _rounded(np.cos), "neg": np.negative, "abs": np.abs,
}  # fmt: skip


@operation(*_FUNCTIONS)
def _function(instruction: Instruction) -> Run:
    function, name = _FUNCTIONS[instruction.opcode], instruction.type
    if name[0] == "s":
        return computed(instruction, function, (name,), name)
    if _is_half(name):
        return _half_operation(instruction, function)
    if name == "f64" and instruction.opcode in ("rcp", "rsqrt") and instruction.has("approx"):
        return computed(instruction, lambda a: _upper(function(_upper(a))), (name,), name)
    return _float_operation(instruction, function)


def _upper(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """rcp.approx.ftz.f64 sees and gives the upper 32 bits only."""
    bits = values.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)
    return bits.view(np.float64)


@operation("copysign")
def _copysign(instruction: Instruction) -> Run:
    return computed(instruction, lambda sign, size: np.copysign(size, sign), (instruction.type,) * 2, instruction.type)


# -- bits


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
    half, packed = _is_half(name), name.endswith("x2")
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
            x, y = (from_half(_halves(each) if packed else each, name) for each in (x, y))
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
    if _is_half(name) or _is_half(result) or len(instruction.operands) != 3:
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


# -- moves and conversions


@operation("mov")
def _mov(instruction: Instruction) -> Run:
    """Also to and from {lower, ..., upper}."""
    name = instruction.type
    destination, source = instruction.operands
    if isinstance(source, Vector):
        parts = source.elements
        each = 8 * size_of(name) // len(parts)
        reads = [reader(instruction, part, f"u{each}") for part in parts]
        write = writer(instruction, destination, name)
        dtype = np.dtype(f"u{size_of(name)}")

        def pack(block: Block, threads: Threads) -> None:
            total = reads[0](threads).astype(dtype)
            for place in range(1, len(reads)):
                total = total | (reads[place](threads).astype(dtype) << dtype.type(each * place))
            write(threads, total)

        return pack
    if isinstance(destination, Vector):
        each = 8 * size_of(name) // len(destination.elements)
        read = reader(instruction, source, f"u{8 * size_of(name)}")
        writes = [writer(instruction, part, f"u{each}") for part in destination.elements]
        narrow = np.dtype(f"u{each // 8}")

        def unpack(block: Block, threads: Threads) -> None:
            whole = read(threads).copy()
            for place, write in enumerate(writes):
                write(threads, (whole >> whole.dtype.type(each * place)).astype(narrow))

        return unpack
    if isinstance(source, (Register, Immediate)) and isinstance(destination, Register) and name != "pred":
        name = {2: "u16", 4: "u32", 8: "u64"}[size_of(name)]  # bits, whatever they stand for
    return computed(instruction, lambda a: a, (name,), name)


_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_LIMITS = {"s8": np.int8, "u8": np.uint8, "s16": np.int16, "u16": np.uint16, "s32": np.int32, "u32": np.uint32,
           "s64": np.int64, "u64": np.uint64}  # fmt: skip


@operation("cvt")
def _cvt(instruction: Instruction) -> Run:
    *words, to, of = instruction.modifiers
    if to in ("bf16x2", "f16x2") and of == "f32":
        return _pack_halves(instruction, to, words)
    if "e4m3x2" in (to, of) or "e5m2x2" in (to, of):
        return _cvt_e4m3(instruction, to, of, words)
    storage = {"bf16": "u16", "f16": "u16"}
    floats = {"f16", "bf16", "f32", "f64"}
    if to in floats and of in floats:
        convert = _float_to_float(to, of, words)
    elif of in floats:
        convert = _float_to_int(to, of, words)
    elif to in floats:
        if not set(words) <= {"rn"}:
            raise KeyError(words)
        dtype = {"f32": np.float32, "f64": np.float64, "f16": np.float16}
        if to == "bf16":
            convert = lambda a: to_bf16(_odd(a.astype(np.float64)))  # noqa: E731
        elif to == "f16":
            convert = lambda a: a.astype(np.float16).view(np.uint16)  # noqa: E731
        else:
            convert = lambda a: a.astype(dtype[to])  # noqa: E731
    elif "sat" in words:
        low, high = np.iinfo(_LIMITS[to]).min, np.iinfo(_LIMITS[to]).max
        convert = lambda a: np.clip(a, max(low, np.iinfo(a.dtype).min), min(high, np.iinfo(a.dtype).max)).astype(  # noqa: E731
            _LIMITS[to]
        )
    else:
        target = _LIMITS[to.replace("b", "u")]
        convert = lambda a: a.astype(target)  # noqa: E731
    return computed(instruction, convert, (storage.get(of, of),), storage.get(to, to))


def _float_to_float(to: str, of: str, words: list[str]) -> Callable[[NDArray], NDArray]:
    dtype = {"f32": np.float32, "f64": np.float64}
    rounding = next((word for word in words if word in ("rn", "rz")), "rn")
    whole = next((_ROUND[word] for word in words if word in _ROUND), None)
    if not set(words) <= {"rn", "rz", "ftz", "sat", *_ROUND}:
        raise KeyError(words)

    def convert(a: NDArray) -> NDArray:
        wide = from_half(a, of) if of in ("f16", "bf16") else a
        if whole:
            wide = whole(wide)
        if "ftz" in words:
            wide = flush(wide)
        if "sat" in words:
            wide = np.where(np.isnan(wide), 0, np.clip(wide, 0, 1)).astype(wide.dtype)
        if to in ("f16", "bf16"):
            return to_half(wide, to, rounding)
        if rounding == "rz" and to == "f32" and of == "f64":
            raise KeyError("rz")
        return wide.astype(dtype[to])

    return convert


def _float_to_int(to: str, of: str, words: list[str]) -> Callable[[NDArray], NDArray]:
    """What does not fit becomes the limit, NaN 0 (of 64 bits: the lowest number's bits)."""
    limits = np.iinfo(_LIMITS[to])
    whole = next(_ROUND[word] for word in words if word in _ROUND)

    def convert(a: NDArray) -> NDArray:
        wide = (from_half(a, of) if of in ("f16", "bf16") else a).astype(np.float64)
        rounded = whole(wide)
        inside = (rounded >= limits.min) & (rounded < float(limits.max) + (1 if size_of(to) < 8 else 0))
        values = np.where(inside, rounded, 0).astype(_LIMITS[to])
        values = np.where(~inside & (rounded > 0), limits.max, values)
        values = np.where(~inside & (rounded < 0), limits.min, values)
        if size_of(to) == 8:
            values = np.where(np.isnan(wide), _LIMITS[to](1 << 63 if to == "u64" else limits.min), values)
        return values.astype(_LIMITS[to])

    return convert


def _pack_halves(instruction: Instruction, to: str, words: list[str]) -> Run:
    """cvt d, a, b: a above, b below."""
    rounding = "rz" if "rz" in words else "rn"
    if not set(words) <= {"rn", "rz", "relu"}:
        raise KeyError(words)
    relu = "relu" in words

    def pack(upper: NDArray, lower: NDArray) -> NDArray:
        both = np.stack(np.broadcast_arrays(lower, upper), 1)
        if relu:
            both = np.where(both > 0, both, np.where(np.isnan(both), both, np.float32(0)))
        return to_half(both, to, rounding).view(np.uint32)[:, 0]

    return computed(instruction, pack, ("f32", "f32"), "u32")


def _e4m3_values() -> NDArray[np.float32]:
    codes = np.arange(128)
    exponent, mantissa = codes >> 3, codes & 7
    values = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10.0), mantissa * 2.0**-9)
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


E4M3 = _e4m3_values()  # of each of the 256 codes
_E4M3_ORDER = E4M3[:127]  # what is not negative, in order


def to_e4m3(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """To nearest even; what is beyond 448 becomes 448, NaN 0x7F."""
    size = np.abs(values.astype(np.float64))
    above = np.clip(np.searchsorted(_E4M3_ORDER, size), 0, 126)
    below = np.maximum(above - 1, 0)
    up, down = _E4M3_ORDER[above] - size, size - _E4M3_ORDER[below]
    code = np.where((down < up) | ((down == up) & (below % 2 == 0)), below, above)
    code = np.where(np.isnan(values), 127, code)
    return (code + 128 * np.signbit(values)).astype(np.uint8)


def _cvt_e4m3(instruction: Instruction, to: str, of: str, words: list[str]) -> Run:
    if to == "e4m3x2" and of in ("f32", "f16x2"):
        if "satfinite" not in words or "relu" in words:
            raise KeyError(words)
        if of == "f16x2":
            return computed(
                instruction, lambda a: to_e4m3(from_half(_halves(a), "f16")).view(np.uint16)[:, 0], ("u32",), "u16"
            )

        def pack(upper: NDArray, lower: NDArray) -> NDArray:
            return to_e4m3(np.stack(np.broadcast_arrays(lower, upper), 1)).view(np.uint16)[:, 0]

        return computed(instruction, pack, ("f32", "f32"), "u16")
    if of == "e4m3x2" and to in ("f16x2", "bf16x2"):

        def unpack(a: NDArray) -> NDArray:
            codes = np.ascontiguousarray(a.astype(np.uint16)).view(np.uint8).reshape(-1, 2)
            return to_half(E4M3[codes], to).view(np.uint32)[:, 0]

        return computed(instruction, unpack, ("u16",), "u32")
    raise KeyError(to)
