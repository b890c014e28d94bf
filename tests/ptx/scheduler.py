"""Which threads of a block run next: control flow, warps that part, meet and wait, and operations that finish late."""

from __future__ import annotations

from functools import partial

import numpy as np

from tests.ptx.block import Block, Blocked, Strand
from tests.ptx.operands import reader
from tests.ptx.syntax import Instruction, PTXError, Symbol
from tests.ptx.threads import WARP, Threads, full


class Deadlock(PTXError):
    """No thread of a block can go on."""


class Scheduler:
    """Runs a block that has begun."""

    def __init__(self, block: Block) -> None:
        self.block, self.machine = block, block.machine
        self.strands, self.pending = block.strands, block.pending

    def go(self) -> None:
        """Until every thread has returned. Raises Deadlock where none can go on, and PTXError with the line."""
        while self.strands:
            strand = self._next()
            self.strands.remove(strand)
            self._run(strand)
        while self.pending:
            self.pending.pop(0)()
        for call in self.block.at_exit:
            call()

    def _next(self) -> Strand:
        """Threads that run now, with all others at their place: the lowest in the program, or drawn at random."""
        if len(self.strands) == 1 and self.strands[0].ready is None:
            if self.machine.random and self.strands[0].threads.whole:
                return self._cut(self.strands[0])
            return self.strands[0]
        while True:
            ready = [strand for strand in self.strands if strand.ready is None or strand.ready()]
            if ready:
                break
            if not self.pending:
                raise Deadlock(f"{self.machine.kernel.name}: no thread can go on\n" + self._report())
            self.pending.pop(self.machine.chance.randrange(len(self.pending)) if self.machine.random else 0)()
        chosen = min(ready, key=lambda strand: strand.pc)
        if self.machine.random:
            chosen = self.machine.chance.choice(ready)
            mine = set((chosen.threads.index // WARP).tolist())
            if not chosen.threads.whole:  # others of the same warps that are behind come first, so that they meet
                chosen = min((each for each in ready if mine & set((each.threads.index // WARP).tolist())),
                             key=lambda strand: strand.pc)  # fmt: skip
        same = [strand for strand in ready if strand.pc == chosen.pc]
        for strand in same:
            self.strands.remove(strand)
        index = np.sort(np.concatenate([strand.threads.index for strand in same]))
        merged = Strand(chosen.pc, self.block.threads(index))
        self.strands.append(merged)
        if self.machine.random and merged.threads.whole:
            return self._cut(merged)
        return merged

    def _cut(self, strand: Strand) -> Strand:
        """Sometimes only some of its warps."""
        chance, threads = self.machine.chance, strand.threads
        if threads.count <= WARP or chance.random() < 0.7:
            return strand
        middle = threads.low + WARP * chance.randrange(1, threads.count // WARP)
        parts = [np.arange(threads.low, middle), np.arange(middle, threads.high)]
        chance.shuffle(parts)
        self.strands.remove(strand)
        self.strands.append(Strand(strand.pc, self.block.threads(parts[1])))
        first = Strand(strand.pc, self.block.threads(parts[0]))
        self.strands.append(first)
        return first

    def _run(self, strand: Strand) -> None:
        """To the end of its run of instructions; further as long as nobody else is there."""
        pc, threads, block, segment = strand.pc, strand.threads, self.block, self.machine.segment
        alone = not self.strands and not self.machine.random
        try:
            while True:
                runs, last, follows = segment(pc)
                for run in runs:
                    run(block, threads)
                if last is None:
                    pc = follows
                else:
                    taken = self._branch(last, threads)
                    if taken is None:
                        return
                    pc = taken
                if not alone:
                    self.strands.append(Strand(pc, threads))
                    return
        except Blocked as blocked:
            place, line = blocked.instruction.index, blocked.instruction.line
            rest = threads.index
            for waiting, ready, what in blocked.waits:
                pc = place if blocked.again else place + 1
                self.strands.append(Strand(pc, waiting, ready, partial("line {}: {}".format, line, what)))
                rest = np.setdiff1d(rest, waiting.index, assume_unique=True)
            if len(rest):
                self.strands.append(Strand(place + 1, self.block.threads(rest)))
        except PTXError as error:
            if str(error).startswith("line "):
                raise
            raise self.machine.kernel.instructions[pc + runs.index(run)].error(str(error)) from error

    def _branch(self, instruction: Instruction, threads: Threads) -> int | None:
        """Where all of them go on; None where they part (they have been put among the strands) or return."""
        taken = threads.count
        if instruction.predicate is not None:
            mask = threads.pred[instruction.predicate.index]
            if instruction.negated:
                mask = ~mask
            taken = int(np.count_nonzero(mask))
        if taken == 0:
            return instruction.index + 1
        if instruction.opcode == "brx":
            if taken < threads.count:
                self.strands.append(Strand(instruction.index + 1, threads.where(~mask)))
                threads = threads.where(mask)
            self._choose(instruction, threads)
            return None
        if instruction.opcode == "bra":
            target = instruction.operands[0]
            assert isinstance(target, Symbol)
            there = self.machine.kernel.labels[target.name]
            if taken == threads.count:
                return there
            self.strands.append(Strand(there, threads.where(mask)))
            self.strands.append(Strand(instruction.index + 1, threads.where(~mask)))
            return None
        if taken < threads.count:
            self.strands.append(Strand(instruction.index + 1, threads.where(~mask)))
        return None

    def _choose(self, instruction: Instruction, threads: Threads) -> None:
        """brx.idx: each thread goes on where its number in a table of labels says."""
        number, table = instruction.operands
        assert isinstance(table, Symbol)
        targets = self.machine.kernel.tables[table.name]
        numbers = full(reader(instruction, number, "u32")(threads), threads)
        if numbers.max() >= len(targets):
            raise instruction.error(f"there are {len(targets)} labels, and a thread takes number {numbers.max()}")
        for each in np.unique(numbers):
            self.strands.append(Strand(self.machine.kernel.labels[targets[each]], threads.where(numbers == each)))

    def _report(self) -> str:
        lines = []
        for strand in sorted(self.strands, key=lambda each: each.threads.low):
            index = strand.threads.index
            at = self.machine.kernel.instructions[strand.pc] if strand.pc < len(self.machine.program) else None
            lines.append(f"  threads {index[0]} to {index[-1]} ({len(index)}) wait, {strand.what()}; "
                         f"next: {at.text[:80] if at else 'the end'}")  # fmt: skip
        return "\n".join(lines)
