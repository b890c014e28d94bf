"""Barriers of a block, traps, and what changes no value here: hints, fences of memory, waits for time."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.ptx.block import Block
from tests.ptx.instructions.lanes import meet
from tests.ptx.operands import reader
from tests.ptx.operations import Run, operation
from tests.ptx.syntax import Instruction, PTXError
from tests.ptx.threads import WARP, Threads


@operation("bar", "barrier")
def _barrier(instruction: Instruction) -> Run:
    """Named barriers, counted by threads. All threads of a block come where no count is given."""
    words = [each for each in instruction.modifiers if each not in ("cta", "aligned")]
    if words[0] == "cluster":  # clusters are of one block
        return lambda block, threads: None
    if words[0] == "warp":
        masks = reader(instruction, instruction.operands[0], "u32")
        return lambda block, threads: meet(instruction, block, threads, masks(threads))
    if words[0] not in ("sync", "arrive") or len(words) > 1:
        raise KeyError(words[0])
    names = reader(instruction, instruction.operands[0], "u32")
    counts = reader(instruction, instruction.operands[1], "u32") if len(instruction.operands) > 1 else None
    waits_too = words[0] == "sync"

    def run(block: Block, threads: Threads) -> None:
        numbers, waits = names(threads), []
        expected = counts(threads) if counts else np.array([block.size])
        barriers = block.state.setdefault("barriers", {})
        for number in np.unique(numbers).tolist():
            here = threads if len(numbers) == 1 or (numbers == number).all() else threads.where(numbers == number)
            limit = int(expected[0] if len(expected) == 1 else expected[numbers == number][0])
            if number > 15 or limit % WARP or limit > block.size:
                raise PTXError(f"barrier {number} of {limit} threads, in a block of {block.size}")
            state = barriers.setdefault(number, {"arrived": [], "count": 0, "round": 0, "limit": limit})
            if state["count"] and state["limit"] != limit:
                raise PTXError(f"barrier {number} of {limit} threads, which others take for one of {state['limit']}")
            state["limit"] = limit
            state["arrived"].append(here.index)
            state["count"] += here.count
            if state["count"] > limit:
                raise PTXError(f"{state['count']} threads come to barrier {number} of {limit}")
            if state["count"] == limit:
                everyone = here if here.count == limit else block.threads(np.sort(np.concatenate(state["arrived"])))
                state["arrived"], state["count"], state["round"] = [], 0, state["round"] + 1
                for call in block.on_barrier:
                    call(everyone)
            elif waits_too:

                def ready(state: dict[str, Any] = state, begun: int = state["round"]) -> bool:
                    return state["round"] != begun

                waits.append((here, ready, f"for barrier {number} ({state['count']} of {limit} threads)"))
        block.wait(instruction, waits, again=False)

    return run


@operation("prefetch", "prefetchu", "membar", "griddepcontrol", "nanosleep", "applypriority", "discard")
def _nothing(instruction: Instruction) -> Run:
    """Nothing that a value depends on."""
    return lambda block, threads: None


@operation("trap", "brkpt")
def _trap(instruction: Instruction) -> Run:
    def run(block: Block, threads: Threads) -> None:
        raise PTXError(f"threads {threads.index.tolist()[:4]}... trap")

    return run
