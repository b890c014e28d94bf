"""Moves, also to and from parts of a register, and conversions: to nearest even where no other way is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.ptx.block import Block
from tests.ptx.instructions.arithmetic import computed, flush, from_half, halves, odd, to_bf16, to_half
from tests.ptx.operands import reader, writer
from tests.ptx.operations import Run, operation
from tests.ptx.syntax import Immediate, Instruction, Register, Vector, size_of
from tests.ptx.threads import Threads


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
_LIMITS: dict[str, Any] = {
    "s8": np.int8, "u8": np.uint8, "s16": np.int16, "u16": np.uint16, "s32": np.int32, "u32": np.uint32,
    "s64": np.int64, "u64": np.uint64,
}  # fmt: skip


@operation("cvt")
def _cvt(instruction: Instruction) -> Run:
    *words, to, of = instruction.modifiers
    if to in ("bf16x2", "f16x2") and of == "f32":
        return _packhalves(instruction, to, words)
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
            convert = lambda a: to_bf16(odd(a.astype(np.float64)))  # noqa: E731
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


def _packhalves(instruction: Instruction, to: str, words: list[str]) -> Run:
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
                instruction, lambda a: to_e4m3(from_half(halves(a), "f16")).view(np.uint16)[:, 0], ("u32",), "u16"
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
