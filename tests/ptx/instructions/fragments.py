"""How matrices lie in registers and in shared memory for the tensor cores of sm_80 and sm_90 (PTX ISA, "Matrix
multiply-accumulate" and "Asynchronous warpgroup level matrix instructions").

Operands are 32 bytes of K wide (or 16), whatever their type, so their layouts are given in bytes: a row of A is 16
bfloat16, 32 float8 or 8 tf32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from tests.ptx.instructions.swizzle import swizzled

_SWIZZLE_OF_CODE = {0: 16, 1: 128, 2: 64, 3: 32}


@dataclass(frozen=True)
class MatrixDescriptor:
    """A matrix in shared memory as wgmma takes it: the address of its first byte, two distances in bytes between its
    blocks, and its swizzle in bytes (16: none)."""

    start: int
    leading: int
    stride: int
    width: int

    @staticmethod
    def decode(bits: int) -> MatrixDescriptor:
        """From the 64 bits of an instruction's operand. Raises ValueError for a base offset other than 0."""
        if bits >> 49 & 7:
            raise ValueError(f"the matrix descriptor {bits:#018x} has a base offset, which is not modelled")
        start, leading, stride = (16 * (bits >> shift & 0x3FFF) for shift in (0, 16, 32))
        return MatrixDescriptor(start, leading, stride, _SWIZZLE_OF_CODE[bits >> 62 & 3])

    def pieces(self, extent: int, k_major: bool) -> np.ndarray:
        """Addresses of the 16-byte pieces of one instruction's operand with `extent` rows of A or columns of B.

        K-major: [extent, 2], pieces along K. Otherwise (16-bit types only): [16, extent / 8], a K in each row.
        """
        return swizzled(self.start + _offsets(extent, k_major, self.leading, self.stride, self.width), self.width)


@cache
def _offsets(extent: int, k_major: bool, leading: int, stride: int, width: int) -> np.ndarray:
    if k_major:
        row, piece = np.arange(extent)[:, None], np.arange(2)
        return row % 8 * width + row // 8 * stride + piece * (leading if width == 16 else 16)
    k, piece, wide = np.arange(16)[:, None], np.arange(extent // 8), width // 16
    if width == 16:
        return k % 8 * 16 + k // 8 * leading + piece * stride
    return k % 8 * width + k // 8 * stride + piece % wide * 16 + piece // wide * leading


def gathered(shared: np.ndarray, descriptor: MatrixDescriptor, extent: int, k_major: bool, kind: str) -> np.ndarray:
    """[extent, K] float64: the operand's values, in shared memory (uint8, a multiple of 16 bytes long)."""
    pieces = shared[: len(shared) // 16 * 16].reshape(-1, 16)[descriptor.pieces(extent, k_major) >> 4]
    values = decoded(pieces.reshape(pieces.shape[0], -1), kind)
    return values if k_major else values.T


def decoded(data: np.ndarray, kind: str) -> np.ndarray:
    """float64 values of bytes [..., n]; `kind` is a PTX type. tf32 leaves out the 13 lowest bits of a float32, as the
    tensor cores do. Raises ValueError for a type that they do not multiply."""
    if kind == "bf16":
        wide = np.ascontiguousarray(data).view(np.uint16).astype(np.uint32) << 16
        return wide.view(np.float32).astype(np.float64)
    if kind == "f16":
        return np.ascontiguousarray(data).view(np.float16).astype(np.float64)
    if kind == "tf32":
        kept = np.ascontiguousarray(data).view(np.uint32) & np.uint32(0xFFFFE000)
        return kept.view(np.float32).astype(np.float64)
    if kind in ("e4m3", "e5m2"):
        return _float8(kind)[data]
    raise ValueError(f'matrices of "{kind}" are not modelled; bf16, f16, tf32, e4m3 and e5m2 are')


@cache
def _float8(kind: str) -> np.ndarray:
    """The 256 values of a float8 type; S.11..1 of e4m3 is its only NaN, and e5m2 is the upper byte of a float16."""
    if kind == "e5m2":
        return (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float64)
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    size[(code & 127) == 127] = np.nan
    return np.where(code >> 7, -size, size)


@cache
def sum_places(rows: int, columns: int) -> np.ndarray:
    """Where a thread's sums lie in the flattened [rows, columns] matrix: int [columns * rows / threads, threads].

    16 rows belong to a warp (of which m16n8 has one and m64 four): register 2j and 2j + 1 hold two neighbours of row
    lane / 4, plus 8 for odd j.
    """
    threads = rows * 2
    thread, register = np.arange(threads), np.arange(columns // 2)[:, None]
    row = thread // 32 * 16 + thread % 32 // 4 + register // 2 % 2 * 8
    column = register // 4 * 8 + thread % 4 * 2 + register % 2
    return row * columns + column


@cache
def _left_places(rows: int, registers: int) -> np.ndarray:
    """Where a thread's registers of A lie in [rows, registers * 8 bytes] seen as 32-bit words: [registers, threads]."""
    thread, register = np.arange(rows * 2), np.arange(registers)[:, None]
    row = thread // 32 * 16 + thread % 32 // 4 + register % 2 * 8
    return row * (registers * 2) + thread % 4 + register // 2 * 4


def left_operand(registers: np.ndarray, kind: str) -> np.ndarray:
    """[rows, K] float64 of A from registers [2 or 4, threads] (uint32) of warps with 16 rows each."""
    count, threads = registers.shape
    words = np.empty(threads * count, np.uint32)
    words[_left_places(threads // 2, count)] = registers
    return decoded(words.reshape(threads // 2, count * 2).view(np.uint8), kind)


def right_operand(registers: np.ndarray, kind: str) -> np.ndarray:
    """[warps, 8, K] float64: the columns of B of each warp's mma.sync, from registers [1 or 2, threads] (uint32)."""
    count = len(registers)
    words = registers.reshape(count, -1, 8, 4).transpose(1, 2, 0, 3)
    return decoded(np.ascontiguousarray(words).reshape(-1, 8, count * 4).view(np.uint8), kind)


def accumulated(sums: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """float32 [..., rows, columns]: `sums` plus `left` [..., rows, K] times `right` [..., columns, K]; exact products
    are added one K after the other in float64 and rounded once, so no element depends on another's place or value."""
    total = sums.astype(np.float64)
    product = np.empty_like(total)
    down, across = np.moveaxis(left, -1, 0).copy(), np.moveaxis(right, -1, 0).copy()
    with np.errstate(all="ignore"):
        for column, row in zip(down, across, strict=True):
            np.multiply(column[..., None], row[..., None, :], out=product)
            total += product
        return total.astype(np.float32)
