"""Instructions that compute with integers and floats.

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

from tests.ptx.block import Block
from tests.ptx.operands import reader, writer
from tests.ptx.operations import Run, operation
from tests.ptx.syntax import Instruction, Register, size_of
from tests.ptx.threads import Threads

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
    if into and len(reads) == 2 and isinstance(destination, Register) and result in _NATIVE[destination.file]:
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
        return to_bf16(odd(values) if values.dtype == np.float64 else values, rounding)
    if rounding == "rz":
        near = values.astype(np.float16)
        beyond = np.abs(near.astype(np.float64)) > np.abs(values)
        return near.view(np.uint16) - beyond.astype(np.uint16)
    bits = values.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), bits)


def odd(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """float64 as float32 rounded to odd: a second rounding, to fewer bits, then goes as if it were the only one."""
    near = values.astype(np.float32)
    bits = near.view(np.uint32).copy()
    inexact = (near.astype(np.float64) != values) & np.isfinite(near)
    bits[inexact & (np.abs(near.astype(np.float64)) > np.abs(values))] -= 1
    bits[inexact] |= 1
    return bits.view(np.float32)


def halves(bits: NDArray) -> NDArray[np.uint16]:
    """uint32 [n] as [n, 2]: lower half first."""
    return np.ascontiguousarray(bits).view(np.uint16).reshape(-1, 2)


def is_half(type_name: str) -> bool:
    return type_name in ("f16", "bf16", "f16x2", "bf16x2")


def _half_operation(instruction: Instruction, function: Callable[..., NDArray]) -> Run:
    """Floats of 16 bits, one or two in a register: computed exactly enough in float64 and rounded once."""
    kind = instruction.type
    packed = kind.endswith("x2")

    def compute(*sources: NDArray) -> NDArray:
        wide = [from_half(halves(each) if packed else each, kind).astype(np.float64) for each in sources]
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
    if is_half(name):
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
    if is_half(instruction.type):
        return _half_operation(instruction, lambda a, b, c: a * b + c)
    return _float_operation(instruction, _fma)


@operation("min", "max")
def _extreme(instruction: Instruction) -> Run:
    """NaN only where .NaN says so, or where both are."""
    name, least = instruction.type, instruction.opcode == "min"
    strict = instruction.has("NaN")
    ufunc = (np.minimum if strict else np.fmin) if least else (np.maximum if strict else np.fmax)
    if is_half(name):
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
    if is_half(name):
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
