"""Matrix instructions: mma.sync of a warp, and wgmma of a warpgroup, whose products are in flight until their wait.

What is modelled: data flow, layouts, the order of additions between instructions, and the protocol. Inside one
instruction products are exact, added one K after the other in float64 and rounded once; real tensor cores differ there
in last bits.

A product that completes early reads its operands when it is issued, a late one when it is waited for; a late one's sums
are NaN until then. Registers that a product takes hold what they held at the last wgmma.fence, or it is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from tests.ptx.block import BLOCK_HOOKS, Block
from tests.ptx.instructions.fragments import (
    MatrixDescriptor,
    accumulated,
    gathered,
    left_operand,
    right_operand,
    sum_places,
)
from tests.ptx.instructions.lanes import meet
from tests.ptx.instructions.ordering import ProtocolError, ordering_of
from tests.ptx.instructions.products import Product, Warpgroup
from tests.ptx.operands import reader, writer
from tests.ptx.operations import Run, operation
from tests.ptx.syntax import Immediate, Instruction, Operand, Register, Vector
from tests.ptx.threads import Threads, full

_POISON = np.uint32(0xFFFFFFFF)
_DEPTH = {"bf16": 16, "f16": 16, "tf32": 8, "e4m3": 32, "e5m2": 32}  # K of one wgmma
_WARPGROUP = 128  # threads


def _shape(instruction: Instruction) -> tuple[int, int, int]:
    found = re.search(r"\.m(\d+)n(\d+)k(\d+)\.", instruction.text)
    if not found:
        raise instruction.error("it has no shape")
    rows, columns, depth = map(int, found.groups())
    return rows, columns, depth


def _elements(operand: Operand, instruction: Instruction) -> tuple[Operand, ...]:
    if not isinstance(operand, Vector):
        raise instruction.error("a vector of registers is needed")
    return operand.elements


@operation("mma")
def _mma(instruction: Instruction) -> Run:
    """mma.sync.aligned.m16n8k*.row.col with sums in float32."""
    rows, columns, depth = _shape(instruction)
    *_, sum_kind, kind, right_kind, result_kind = instruction.modifiers
    if (rows, columns) != (16, 8) or sum_kind != "f32" or result_kind != "f32" or kind != right_kind:
        raise instruction.error("not modelled: m16n8 with float32 sums and operands of one type are")
    results, *sources = (_elements(operand, instruction) for operand in instruction.operands)
    writers = [writer(instruction, each, "f32") for each in results]
    left, right = ([reader(instruction, each, "b32") for each in operand] for operand in sources[:2])
    sums = [reader(instruction, each, "f32") for each in sources[2]]
    places = sum_places(16, 8)

    def run(block: Block, threads: Threads) -> None:
        meet(instruction, block, threads)
        warps = threads.count // 32
        a = left_operand(np.stack([full(get(threads), threads) for get in left]), kind).reshape(warps, 16, depth)
        b = right_operand(np.stack([full(get(threads), threads) for get in right]), kind)
        before = np.empty((warps, 128), np.float32)
        for register, get in enumerate(sums):
            before[:, places[register]] = full(get(threads), threads).reshape(warps, 32)
        after = accumulated(before.reshape(warps, 16, 8), a, b).reshape(warps, 128)
        for register, put in enumerate(writers):
            put(threads, after[:, places[register]].reshape(-1))

    return run


def _begin(block: Block) -> None:
    flying = block.state["products"] = [Warpgroup() for _ in range(-(-block.size // _WARPGROUP))]

    def check() -> None:
        for number, warpgroup in enumerate(flying):
            if warpgroup.open or warpgroup.groups:
                raise ProtocolError(f"warpgroup {number} has ended before its products")

    block.at_exit.append(check)


BLOCK_HOOKS.append(_begin)


def _warpgroups(block: Block, threads: Threads, instruction: Instruction, work: Callable[[int], None]) -> None:
    """Does `work` for each warpgroup of which all four warps are here; the others wait until they are."""
    meet(instruction, block, threads)
    warps = threads.index[::32] // 32
    waits = []
    for number in np.unique(warps // 4).tolist():
        here = warps[warps // 4 == number]
        if len(here) == 4:
            work(number)
        else:
            part = threads.where(threads.index // _WARPGROUP == number)
            waits.append((part, partial(_all_here, block, number, instruction.index), f"for warpgroup {number}"))
    block.wait(instruction, waits, again=True)


def _all_here(block: Block, warpgroup: int, index: int) -> bool:
    low, count = warpgroup * _WARPGROUP, 0
    for strand in block.strands:
        if strand.pc == index:
            count += int(np.count_nonzero(strand.threads.index // _WARPGROUP == warpgroup))
    return count == min(_WARPGROUP, block.size - low)


@operation("wgmma")
def _wgmma(instruction: Instruction) -> Run:
    """wgmma.fence, .commit_group, .wait_group and .mma_async."""
    work: Callable[[Block, int], None]
    if instruction.has("mma_async"):
        work = _AsyncProduct(instruction).issue
    elif instruction.has("fence"):
        work = _fence
    elif instruction.has("commit_group"):
        work = lambda block, warpgroup: block.state["products"][warpgroup].commit()  # noqa: E731
    elif instruction.has("wait_group"):
        work = partial(_wait_group, instruction.operands[0].value)  # type: ignore[union-attr]
    else:
        raise instruction.error("not modelled")

    def run(block: Block, threads: Threads) -> None:
        _warpgroups(block, threads, instruction, lambda warpgroup: work(block, warpgroup))

    return run


def _registers(block: Block, warpgroup: int, rows: np.ndarray) -> Any:
    """The place of 32-bit registers in the register file: for reading (a copy) and for writing."""
    return rows, slice(warpgroup * _WARPGROUP, (warpgroup + 1) * _WARPGROUP)


def _fence(block: Block, warpgroup: int) -> None:
    """From here on products may take and write registers as they are now."""
    threads = slice(warpgroup * _WARPGROUP, (warpgroup + 1) * _WARPGROUP)
    block.state["products"][warpgroup].fenced = block.files["b32"][:, threads].copy()


def _wait_group(most: int, block: Block, warpgroup: int) -> None:
    done, last = block.state["products"][warpgroup].wait(most)
    for product in done:
        ordering_of(block).ends_async_read(_warps(warpgroup), product.pieces)
    for product in last:
        sums = product.run()
        rows = np.array([register.index for register in product.registers])
        values = sums.reshape(-1)[sum_places(*sums.shape)].view(np.uint32)
        block.files["b32"][_registers(block, warpgroup, rows)] = values
        block.state["products"][warpgroup].fenced[rows] = values  # a product's own sums need no other fence


def _warps(warpgroup: int) -> range:
    return range(warpgroup * 4, warpgroup * 4 + 4)


class _AsyncProduct:
    """One wgmma.mma_async.sync.aligned.m64n*k* of the program."""

    def __init__(self, instruction: Instruction) -> None:
        self.instruction = instruction
        rows, self.columns, depth = _shape(instruction)
        *_, sum_kind, self.kind, right_kind = instruction.modifiers
        if rows != 64 or sum_kind != "f32" or self.kind != right_kind or _DEPTH.get(self.kind) != depth:
            raise instruction.error("not modelled: m64 with float32 sums and operands of one type are")
        sums, left, right, accumulate, *flags = instruction.operands
        numbers = [flag.value for flag in flags if isinstance(flag, Immediate)]
        self.in_registers = isinstance(left, Vector)
        transposes = 0 if depth != 16 else 1 if self.in_registers else 2
        if len(numbers) != len(flags) or len(numbers) != 2 + transposes:
            raise instruction.error("its flags are not understood")
        self.signs = numbers[:2]
        k_major = [not flag for flag in numbers[2:]] or [True, True]
        self.sums = self._rows_of(sums, self.columns // 2)
        self.left = self._rows_of(left, 4) if self.in_registers else ((), np.empty(0, np.int64))
        described = [(right, self.columns, k_major[-1])]
        if not self.in_registers:
            described.insert(0, (left, 64, k_major[0]))
        self.matrices = [(reader(instruction, each, "b64"), extent, major) for each, extent, major in described]
        self.accumulate = reader(instruction, accumulate, "pred")

    def _rows_of(self, operand: Operand, count: int) -> tuple[tuple[Register, ...], np.ndarray]:
        registers = tuple(
            each for each in _elements(operand, self.instruction) if isinstance(each, Register) and each.file == "b32"
        )
        if len(registers) != count:
            raise self.instruction.error(f"a vector of {count} registers of 32 bits is needed")
        return registers, np.array([register.index for register in registers])

    def _uniform(self, get: Callable[[Threads], np.ndarray], block: Block, warpgroup: int) -> int:
        """The value that the threads of the warpgroup agree on."""
        values = get(block.threads(np.arange(warpgroup * _WARPGROUP, (warpgroup + 1) * _WARPGROUP)))
        if (values != values[0]).any():
            raise ProtocolError("threads of a warpgroup differ in a descriptor or in whether there are sums before")
        return int(values[0])

    def _operands(
        self, block: Block, warpgroup: int, matrices: list[MatrixDescriptor], given: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """A and B as they are now, but for registers of A that are `given`."""
        found = [
            gathered(block.shared, matrix, extent, major, self.kind)
            for matrix, (_, extent, major) in zip(matrices, self.matrices, strict=True)
        ]
        if self.in_registers:
            registers = block.files["b32"][_registers(block, warpgroup, self.left[1])] if given is None else given
            found.insert(0, left_operand(registers, self.kind))
        left, right = (matrix * sign if sign != 1 else matrix for matrix, sign in zip(found, self.signs, strict=True))
        return left, right

    def issue(self, block: Block, warpgroup: int) -> None:
        flying: Warpgroup = block.state["products"][warpgroup]
        before = flying.before(self.sums[0])
        flying.check_idle(self.left[0])
        matrices = [MatrixDescriptor.decode(self._uniform(get, block, warpgroup)) for get, _, _ in self.matrices]
        pieces = np.concatenate(
            [
                matrix.pieces(extent, major).reshape(-1) >> 4
                for matrix, (_, extent, major) in zip(matrices, self.matrices, strict=True)
            ]
        )
        if pieces.max() >= len(block.shared) // 16:
            raise ProtocolError(
                f"its matrices reach to {pieces.max() * 16 + 16} of {len(block.shared)} bytes of shared memory"
            )
        ordering_of(block).starts_async_read(_warps(warpgroup), pieces)
        place = _registers(block, warpgroup, self.sums[1])
        rows = self.left[1] if before else np.concatenate([self.sums[1], self.left[1]])
        if (
            flying.fenced is None
            or (flying.fenced[rows] != block.files["b32"][_registers(block, warpgroup, rows)]).any()
        ):
            raise ProtocolError("its registers were written to after the last wgmma.fence")
        sums: np.ndarray | Product
        if not self._uniform(self.accumulate, block, warpgroup):
            sums = np.zeros((64, self.columns), np.float32)
        elif before:
            sums = before
        else:
            sums = np.empty((64, self.columns), np.float32)
            sums.reshape(-1)[sum_places(64, self.columns)] = block.files["b32"][place].view(np.float32)
        given = None
        if self.in_registers and not block.machine.strict:
            given = block.files["b32"][_registers(block, warpgroup, self.left[1])]
        operands = partial(self._operands, block, warpgroup, matrices, given)
        product = Product(self.sums[0], sums, operands, pieces, self.instruction.line)
        flying.issue(product)
        if not block.late:
            product.run()
        elif not before:
            block.files["b32"][place] = _POISON
