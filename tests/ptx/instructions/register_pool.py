"""setmaxnreg: warps that give registers to their block's pool, and warps that wait until it has enough (PTX ISA)."""

from __future__ import annotations

import numpy as np

from tests.ptx.block import BLOCK_HOOKS, Block
from tests.ptx.instructions.lanes import meet
from tests.ptx.operations import Run, operation
from tests.ptx.syntax import Immediate, Instruction, PTXError
from tests.ptx.threads import WARP, Threads


def _begin(block: Block) -> None:
    """Registers of a thread, for each warp: what the kernel is launched with."""
    block.state["registers"] = np.full(-(-block.size // WARP), block.machine.kernel.thread_registers or 0)


BLOCK_HOOKS.append(_begin)


@operation("setmaxnreg")
def _setmaxnreg(instruction: Instruction) -> Run:
    (operand,) = instruction.operands
    if not isinstance(operand, Immediate) or not 24 <= operand.value <= 256 or operand.value % 8:
        raise instruction.error("registers are a multiple of 8 from 24 to 256")
    wanted, more = operand.value, instruction.has("inc")

    def run(block: Block, threads: Threads) -> None:
        meet(instruction, block, threads)
        launched, held = block.machine.kernel.thread_registers, block.state["registers"]
        if launched is None:
            raise PTXError("the kernel does not say how many registers it is launched with (.maxnreg)")
        total, waits = launched * len(held), []
        for warp in (threads.index[::WARP] // WARP).tolist():
            if more != (wanted >= held[warp]) and wanted != held[warp]:
                raise PTXError(f"warp {warp} has {held[warp]} registers a thread, which cannot become {wanted} so")

            def ready(least: int = wanted - int(held[warp])) -> bool:
                return int(held.sum()) + least <= total

            if ready():
                held[warp] = wanted
            else:
                rows = block.threads(np.arange(warp * WARP, (warp + 1) * WARP))
                waits.append((rows, ready, _Shortage(held, total, wanted)))
        block.wait(instruction, waits, again=True)

    return run


class _Shortage:
    """What a warp waits for, as it is when somebody asks."""

    def __init__(self, held: np.ndarray, total: int, wanted: int) -> None:
        self.held, self.total, self.wanted = held, total, wanted

    def __str__(self) -> str:
        left = self.total - int(self.held.sum())
        return f"{self.wanted} registers a thread; the pool has {left}, and warps hold {self.held.tolist()}"
