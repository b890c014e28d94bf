"""The table of operations: what decodes each opcode, filled by the modules of `tests.ptx.instructions`.

    @operation("not")
    def _not(instruction):                    # once for each place in the program
        target = writer(instruction, instruction.operands[0], instruction.type)
        source = reader(instruction, instruction.operands[1], instruction.type)
        def run(block, threads):              # each time it is executed, for all threads that are there
            target(threads, ~source(threads))
        return run

Predicates are dealt with before `run` is called. `tests.ptx.operands` has readers and writers, `Threads` what can be
asked of threads, `Block` memory, waiting and what is asynchronous. Branches are the scheduler's.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx.block import Block
from tests.ptx.syntax import Instruction
from tests.ptx.threads import Threads

Run = Callable[[Block, Threads], None]
BRANCHES = {"bra", "brx", "ret", "exit"}
_DECODERS: dict[str, Callable[[Instruction], Run]] = {}


def operation(*opcodes: str) -> Callable[[Callable[[Instruction], Run]], Callable[[Instruction], Run]]:
    """Registers what decodes these opcodes."""

    def register(decode: Callable[[Instruction], Run]) -> Callable[[Instruction], Run]:
        for opcode in opcodes:
            _DECODERS[opcode] = decode
        return decode

    return register


def decoded(instruction: Instruction) -> Run:
    """What runs this instruction. Raises PTXError where its opcode, or this form of it, is not known."""
    if instruction.opcode in BRANCHES:
        return _nothing
    decode = _DECODERS.get(instruction.opcode)
    if decode is None:
        raise instruction.error("this opcode is not known to the simulator")
    try:
        run = decode(instruction)
    except (KeyError, IndexError, AttributeError) as error:
        raise instruction.error(f"this form is not known to the simulator ({error!r})") from error
    return run if instruction.predicate is None else _predicated(run, instruction)


def _nothing(block: Block, threads: Threads) -> None:
    """A branch, which the scheduler does."""


def _predicated(run: Run, instruction: Instruction) -> Run:
    assert instruction.predicate is not None
    row, negated = instruction.predicate.index, instruction.negated

    def go(block: Block, threads: Threads) -> None:
        mask = threads.pred[row]
        if negated:
            mask = ~mask
        count = np.count_nonzero(mask)
        if count == threads.count:
            run(block, threads)
        elif count:
            run(block, threads.where(mask))

    return go
