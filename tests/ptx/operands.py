"""Operands, decoded once for each place in the program: functions that read, write or address for some threads.

A type is PTX's name of one: f32 f64 f16 u8..u64 s8..s64 b8..b64 pred; bf16, f16x2 and bf16x2 are read as bits (u16,
u32).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.ptx.syntax import Address, Immediate, Instruction, Negated, Operand, Register, Sink, Special, Symbol, Vector
from tests.ptx.threads import VIEWS, Threads, full

_DTYPES: dict[str, Any] = {name: dtype for views in VIEWS.values() for name, dtype in views.items()} | {
    "u8": np.uint8, "s8": np.int8, "b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64,
    "bf16": np.uint16, "bf16x2": np.uint32, "f16x2": np.uint32,
}  # fmt: skip
_VIEW_OF = {"b16": "u16", "b32": "u32", "b64": "u64", "bf16": "u16", "bf16x2": "u32", "f16x2": "u32"}


def reader(instruction: Instruction, operand: Operand, type_name: str) -> Callable[[Threads], NDArray]:
    """Function of threads to the operand's values: [count], or [1] where all threads see one (an immediate, a symbol,
    %ctaid). They are only to be read: they may be the register itself."""
    dtype, view = _DTYPES[type_name], _VIEW_OF.get(type_name, type_name)
    if isinstance(operand, Negated):
        inner = reader(instruction, operand.operand, type_name)
        return lambda threads: ~inner(threads)
    if isinstance(operand, Immediate):
        constant = _constant(operand, type_name)
        return lambda threads: constant
    if isinstance(operand, Special):
        name = operand.name
        return lambda threads: threads.block.special(name, threads).astype(dtype, copy=False)
    if isinstance(operand, Symbol):
        symbol = operand.name
        return lambda threads: threads.block.machine.address(symbol).astype(dtype)
    if not isinstance(operand, Register):
        raise instruction.error(f"{operand} has no value")
    row = operand.index
    if view in VIEWS[operand.file]:
        rows = operator.attrgetter(view)
        return lambda threads: rows(threads)[row]
    rows = operator.attrgetter(_widest(operand, instruction))
    return lambda threads: rows(threads)[row].astype(dtype)


def _widest(register: Register, instruction: Instruction) -> str:
    if register.file not in ("b16", "b32", "b64"):
        raise instruction.error(f"{register.name} is no number")
    return {"b16": "u16", "b32": "u32", "b64": "u64"}[register.file]


def _constant(operand: Immediate, type_name: str) -> NDArray:
    dtype = np.dtype(_DTYPES[type_name])
    if type_name == "pred":
        return np.array([operand.value != 0])
    if dtype.kind == "f" or operand.kind != "int":
        if operand.kind != "int" and dtype.kind != "f":  # the bits of a float: mov.b32 %r1, 0f3F800000
            return np.array([operand.value & ((1 << 8 * dtype.itemsize) - 1)], np.uint64).astype(dtype)
        return np.array([operand.number]).astype(dtype)
    bits = operand.value & ((1 << 8 * dtype.itemsize) - 1)
    return np.array([bits], f"u{dtype.itemsize}").view(dtype)


def writer(instruction: Instruction, operand: Operand, type_name: str) -> Callable[[Threads, NDArray], None]:
    """Function of threads and values ([count] or [1]) that sets the operand; a register wider than the type is
    extended, by the sign where the type has one."""
    if isinstance(operand, Sink):
        return lambda threads, values: None
    if not isinstance(operand, Register):
        raise instruction.error(f"{operand} cannot be written to")
    view, row, signed = _VIEW_OF.get(type_name, type_name), operand.index, type_name[0] == "s"
    if view not in VIEWS[operand.file]:  # wider than the type
        view = _widest(operand, instruction)
        if signed:
            view = view.replace("u", "s")
    rows = operator.attrgetter(view)

    def write(threads: Threads, values: NDArray) -> None:
        if threads.together:
            rows(threads)[row][:] = values
        else:
            threads.block.views[view][row][threads.index] = values

    return write


def addresses(instruction: Instruction, operand: Operand) -> Callable[[Threads], NDArray[np.uint64]]:
    """Function of threads to the uint64 [count] addresses of an operand [base + offset]."""
    if not isinstance(operand, Address):
        raise instruction.error(f"{operand} is no address")
    base, offset = operand.base, operand.offset
    narrow = isinstance(base, Register) and base.file == "b32"
    source = reader(instruction, base, "u32" if narrow else "u64")
    amount = np.array([offset & (0xFFFFFFFF if narrow else (1 << 64) - 1)], np.uint32 if narrow else np.uint64)

    def get(threads: Threads) -> NDArray[np.uint64]:
        values = source(threads)
        if offset:
            values = values + amount
        return full(values.astype(np.uint64) if narrow else values, threads)

    return get


def elements(operand: Operand) -> tuple[Operand, ...]:
    """Those of a vector; of anything else, itself."""
    return operand.elements if isinstance(operand, Vector) else (operand,)
