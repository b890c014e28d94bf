"""A GPU's block of threads on the CPU: PTX instructions, each run for many threads at once by numpy.

`Machine(module, name, threads, shared).run(grid, arguments)` runs a kernel, block after block. What is modelled is what
PTX promises: every thread's registers and its place in the program, warps that run in any order, barriers, memory that
only what was passed may be touched in, and operations that finish later than they began. Real tensor cores differ in
the last bits of one instruction; nothing here says anything about time.

For those who write instructions
--------------------------------
    @operation("not")
    def _not(instruction):                    # once for each place in the program
        target = writer(instruction, instruction.operands[0], instruction.type)
        source = reader(instruction, instruction.operands[1], instruction.type)
        def run(block, threads):              # each time it is executed, for all threads that are there
            target(threads, ~source(threads))
        return run

- `threads` (class Threads) are threads of one block: whole warps side by side unless the program diverged or the
  instruction is predicated (predicates are dealt with before `run` is called). `threads.count`, `threads.index` (their
  numbers in the block, sorted), `threads.select` (a slice or an index, for arrays over the block's threads),
  `threads.whole` (whole warps side by side: their values reshape to [warps, 32]), `threads.where(mask)`.
- `reader(instruction, operand, type)(threads)` gives an array [count], or [1] where all threads see one value (an
  immediate, a symbol, %ctaid): only read it, it may be the register itself. `type` is PTX's: f32 f64 f16 u8..u64
  s8..s64 b8..b64 pred; bf16, f16x2 and bf16x2 are read as bits (u16, u32). `full(values, threads)` makes it [count].
  `writer(instruction, operand, type)(threads, values)` writes them; a register wider than the type is extended.
  `block.read(operand, threads, type)` and `block.write(operand, threads, type, values)` do the same without decoding
  ahead. A register's row over the whole block is `block.files["b32"][register.index]` (uint32 [threads]).
- `block.shared` is the block's shared memory (uint8 [size]); symbols in it begin at 0, dynamic memory after static.
  `block.memory` is global memory, a Space: `block.memory.bytes(address, size)` is that memory, checked. Addresses in
  generic space: shared is at SHARED_WINDOW, parameters are at PARAMETER_WINDOW. `addresses(instruction, operand)` gives
  a function of threads to uint64 [count] addresses in the space that the operand is of.
  `block.machine.parameter(address)` is the argument whose parameter begins there (a TensorMap).
- To wait: `block.wait(instruction, [(threads, ready, what), ...], again=...)`, which does not return where the list has
  anything in it. Those threads go on once `ready()` is true: at this instruction again, or (again=False) at the next.
  Other threads of the same call go on at once. `what` is for the report of a deadlock: a text, or an object with one.
- Asynchronous operations: `block.late` says whether what is begun now is to be done as late as may be. What an mbarrier
  tells of goes to `block.pending` (functions without arguments): the scheduler calls one when no thread can go on, the
  oldest, or any under a random schedule. `block.at_exit` are called when all threads have returned, before the block's
  memory goes. `block.state` is a dict for what an instruction family keeps for a block, by the family's name.
- A proxy's shadow: `block.written_shared(threads, addresses, size)` is called after every ordinary store to shared
  memory (uint64 [count] addresses, `size` bytes each) and calls each of `block.on_shared_store`, `block.read_shared`
  after every load and calls each of `block.on_shared_load`; `block.on_barrier` are
  called with the threads of every barrier that completes (bar.sync and the like). All of these begin empty for each
  block; functions in BLOCK_HOOKS are called with every block that begins.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.ptx.parse import (
    Address,
    Immediate,
    Instruction,
    Module,
    Negated,
    Operand,
    PTXError,
    Register,
    Sink,
    Special,
    Symbol,
)  # fmt: skip
from tests.ptx.spaces import Region, Space, of_tensors

WARP = 32
SHARED_WINDOW = 1 << 60
PARAMETER_WINDOW = 1 << 61

Run = Callable[["Block", "Threads"], None]
OPERATIONS: dict[str, Callable[[Instruction], Run]] = {}
_VIEWS = {
    "pred": {"pred": np.bool_},
    "b16": {"u16": np.uint16, "s16": np.int16, "f16": np.float16},
    "b32": {"u32": np.uint32, "s32": np.int32, "f32": np.float32},
    "b64": {"u64": np.uint64, "s64": np.int64, "f64": np.float64},
}
DTYPES: dict[str, Any] = {name: dtype for views in _VIEWS.values() for name, dtype in views.items()} | {
    "u8": np.uint8, "s8": np.int8, "b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64,
    "bf16": np.uint16, "bf16x2": np.uint32, "f16x2": np.uint32,
}  # fmt: skip
_VIEW_OF = {"b16": "u16", "b32": "u32", "b64": "u64", "bf16": "u16", "bf16x2": "u32", "f16x2": "u32"}
# The modules that fill OPERATIONS.
_FAMILIES = ("arithmetic", "bits", "conversions", "memory", "tensor_core", "copies", "register_pool")
_ENDS_RUN = {"bra", "ret", "exit", "bar", "barrier", "mbarrier", "brx"}


class Deadlock(PTXError):
    """No thread of a block can go on."""


class Blocked(Exception):
    """Raised by `Block.wait`."""

    def __init__(self, instruction: Instruction, waits: Sequence[Any], again: bool) -> None:
        super().__init__(instruction.text)
        self.instruction, self.waits, self.again = instruction, waits, again


def operation(*opcodes: str) -> Callable[[Callable[[Instruction], Run]], Callable[[Instruction], Run]]:
    """Registers what decodes these opcodes."""

    def register(decode: Callable[[Instruction], Run]) -> Callable[[Instruction], Run]:
        for opcode in opcodes:
            OPERATIONS[opcode] = decode
        return decode

    return register


class _Gathered:
    """Rows of a register file at some threads that do not lie side by side."""

    def __init__(self, table: NDArray, index: NDArray[np.intp]) -> None:
        self.table, self.index = table, index

    def __getitem__(self, row: int) -> NDArray:
        return self.table[row][self.index]


class Threads:
    """Threads of one block; see the module. `threads.f32[i]` is row i of the 32-bit registers as floats (also u32 s32
    u64 s64 f64 u16 s16 f16 pred): the registers themselves where the threads lie side by side, else a copy."""

    def __init__(self, block: Block, index: NDArray[np.intp]) -> None:
        self.block, self.index, self.count = block, index, len(index)
        self.low, self.high = int(index[0]), int(index[-1]) + 1
        self.together = self.high - self.low == self.count
        self.whole = self.together and self.low % WARP == 0 and self.high % WARP == 0
        self.select: Any = slice(self.low, self.high) if self.together else index

    def __getattr__(self, name: str) -> Any:
        """Made when it is first asked for."""
        table = self.block.views.get(name)
        if table is None:
            raise AttributeError(name)
        rows = list(table[:, self.select]) if self.together else _Gathered(table, self.index)
        setattr(self, name, rows)
        return rows

    def where(self, mask: NDArray[np.bool_]) -> Threads:
        """Those at which the mask [count] holds, which must be some."""
        return self.block.threads(self.index[mask])

    def warps(self) -> Iterator[Threads]:
        """Those of each warp."""
        warp = self.index // WARP
        for each in np.unique(warp):
            yield self.block.threads(self.index[warp == each])


def full(values: NDArray, threads: Threads) -> NDArray:
    """[count] of what a reader gave."""
    return values if len(values) == threads.count else np.broadcast_to(values, (threads.count,))


def reader(instruction: Instruction, operand: Operand, type_name: str) -> Callable[[Threads], NDArray]:
    """See the module."""
    dtype, view = DTYPES[type_name], _VIEW_OF.get(type_name, type_name)
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
    if view in _VIEWS[operand.file]:
        rows = operator.attrgetter(view)
        return lambda threads: rows(threads)[row]
    rows = operator.attrgetter(_widest(operand, instruction))
    return lambda threads: rows(threads)[row].astype(dtype)


def _widest(register: Register, instruction: Instruction) -> str:
    if register.file not in ("b16", "b32", "b64"):
        raise instruction.error(f"{register.name} is no number")
    return {"b16": "u16", "b32": "u32", "b64": "u64"}[register.file]


def _constant(operand: Immediate, type_name: str) -> NDArray:
    dtype = np.dtype(DTYPES[type_name])
    if type_name == "pred":
        return np.array([operand.value != 0])
    if dtype.kind == "f" or operand.kind != "int":
        if operand.kind != "int" and dtype.kind != "f":  # the bits of a float: mov.b32 %r1, 0f3F800000
            return np.array([operand.value & ((1 << 8 * dtype.itemsize) - 1)], np.uint64).astype(dtype)
        return np.array([operand.number]).astype(dtype)
    bits = operand.value & ((1 << 8 * dtype.itemsize) - 1)
    return np.array([bits], f"u{dtype.itemsize}").view(dtype)


def writer(instruction: Instruction, operand: Operand, type_name: str) -> Callable[[Threads, NDArray], None]:
    """See the module."""
    if isinstance(operand, Sink):
        return lambda threads, values: None
    if not isinstance(operand, Register):
        raise instruction.error(f"{operand} cannot be written to")
    view, row, signed = _VIEW_OF.get(type_name, type_name), operand.index, type_name[0] == "s"
    if view not in _VIEWS[operand.file]:  # wider than the type
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


class Strand:
    """Threads at one place of the program; `waits` is what they wait for."""

    __slots__ = ("pc", "ready", "threads", "what")

    def __init__(self, pc: int, threads: Threads, ready: Callable[[], bool] | None = None,
                 what: Callable[[], str] = str) -> None:  # fmt: skip
        self.pc, self.threads, self.ready, self.what = pc, threads, ready, what


class Block:
    """One block while it runs; see the module. `place` is its (x, y, z) in the grid."""

    def __init__(self, machine: Machine, size: int) -> None:
        self.machine, self.size = machine, size
        self.files: dict[str, NDArray] = {}
        self.views: dict[str, NDArray] = {}
        for file, views in _VIEWS.items():
            dtype = next(iter(views.values()))
            self.files[file] = np.zeros((machine.kernel.registers[file], size), dtype)
            self.views |= {name: self.files[file].view(each) for name, each in views.items()}
        self.shared = np.zeros(-(-machine.shared // 16) * 16, np.uint8)
        self.shared_space = Space("shared", [Region(self.shared, 0, 0, machine.shared)])
        self._threads: dict[Any, Threads] = {}
        lanes = np.arange(size, dtype=np.uint32)
        self._specials = {"%tid.x": lanes, "%laneid": lanes % WARP, "%warpid": lanes // WARP}
        self._constants: dict[str, NDArray] = {}

    def begin(self, place: tuple[int, int, int], memory: Space) -> None:
        """Registers and shared memory hold 0xFF: what is read before it is written is NaN, or far away."""
        self.memory, self.late = memory, self.machine.late
        for name, table in self.files.items():
            table.fill(True if name == "pred" else -1 & (256**table.itemsize - 1))
        self.shared.fill(0xFF)
        grid = self.machine.grid
        self._constants = {f"%{name}.{axis}": np.array([value], np.uint32) for name, values in (
            ("ctaid", place), ("nctaid", grid), ("ntid", (self.size, 1, 1)), ("tid", (0, 0, 0)),
            ("clusterid", place), ("nclusterid", grid), ("cluster_ctaid", (0, 0, 0)), ("cluster_nctaid", (1, 1, 1)),
        ) for axis, value in zip("xyz", values, strict=True)}  # fmt: skip
        self._constants |= {"%cluster_ctarank": np.zeros(1, np.uint32), "%cluster_nctarank": np.ones(1, np.uint32),
                            "%nwarpid": np.array([self.size // WARP], np.uint32)}  # fmt: skip
        self.pending: list[Callable[[], None]] = []
        self.at_exit: list[Callable[[], None]] = []
        self.on_barrier: list[Callable[[Threads], None]] = []
        self.on_shared_store: list[Callable[[Threads, NDArray, int], None]] = []
        self.on_shared_load: list[Callable[[Threads, NDArray, int], None]] = []
        self.state: dict[str, Any] = {}
        self.strands = [Strand(0, self.threads(np.arange(self.size)))]
        for hook in BLOCK_HOOKS:
            hook(self)

    def special(self, name: str, threads: Threads) -> NDArray:
        if name in self._specials:
            return self._specials[name][threads.select]
        if name in self._constants:
            return self._constants[name]
        raise PTXError(f"special register {name} is not known to the simulator")

    def threads(self, index: NDArray[np.intp]) -> Threads:
        """Threads by their numbers in the block, sorted; the same object for the same threads."""
        low, high = int(index[0]), int(index[-1]) + 1
        key = (low, high) if high - low == len(index) else index.tobytes()
        found = self._threads.get(key)
        if found is None:
            if len(self._threads) > 4096:
                self._threads.clear()
            found = self._threads[key] = Threads(self, index)
        return found

    def read(self, operand: Operand, threads: Threads, type_name: str) -> NDArray:
        return reader(_NOWHERE, operand, type_name)(threads)

    def write(self, operand: Operand, threads: Threads, type_name: str, values: NDArray) -> None:
        writer(_NOWHERE, operand, type_name)(threads, values)

    def written_shared(self, threads: Threads, places: NDArray, size: int) -> None:
        for call in self.on_shared_store:
            call(threads, places, size)

    def read_shared(self, threads: Threads, places: NDArray, size: int) -> None:
        for call in self.on_shared_load:
            call(threads, places, size)

    def wait(self, instruction: Instruction, waits: Sequence[Any], again: bool) -> None:
        """See the module."""
        if waits:
            raise Blocked(instruction, waits, again)

    # -- the scheduler

    def go(self) -> None:
        """Until every thread has returned. Raises Deadlock where none can go on, and PTXError with the line."""
        while self.strands:
            strand = self._next()
            self.strands.remove(strand)
            self._run(strand)
        while self.pending:
            self.pending.pop(0)()
        for call in self.at_exit:
            call()

    def _next(self) -> Strand:
        """Threads that run now, all together that are at their place, lowest first inside a warp."""
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
        merged = Strand(chosen.pc, self.threads(index))
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
        self.strands.append(Strand(strand.pc, self.threads(parts[1])))
        first = Strand(strand.pc, self.threads(parts[0]))
        self.strands.append(first)
        return first

    def _run(self, strand: Strand) -> None:
        """To the end of its run of instructions; further as long as nobody else is there."""
        pc, threads = strand.pc, strand.threads
        alone = not self.strands and not self.machine.random
        try:
            while True:
                runs, last, follows = self.machine.segment(pc)
                for run in runs:
                    run(self, threads)
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
                self.strands.append(Strand(place + 1, self.threads(rest)))
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
            return self._choose(instruction, threads)
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
        numbers = full(self.read(number, threads, "u32"), threads)
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


BLOCK_HOOKS: list[Callable[[Block], None]] = []
_NOWHERE = Instruction("read", (), (), None, False, -1, 0, "outside a program")


class Machine:
    """A kernel, decoded. `threads` are those of a block, `shared` its bytes of shared memory, static ones included.

    `schedule` is "in order" (lowest place in the program first) or "random" (warps in an order drawn with `seed`);
    `completion` "early" or "late": when asynchronous operations are done. `strict=False` is for plain kernels of Triton
    3.6, which break two rules of PTX: it lets the async proxy read what ordinary instructions wrote without a
    fence.proxy.async, and registers of A be written while a wgmma that takes them is in flight.
    """

    def __init__(self, module: Module, name: str, threads: int, shared: int, schedule: str = "in order",
                 completion: str = "early", seed: int = 0, strict: bool = True) -> None:  # fmt: skip
        self.module, self.kernel, self.size, self.shared = module, module.kernels[name], threads, shared
        if self.kernel.threads not in (None, threads) and threads % WARP:
            raise PTXError(f"{name} is for {self.kernel.threads} threads and is run with {threads}")
        for family in _FAMILIES:
            import_module(f"tests.ptx.{family}")
        self.set_schedule(schedule, completion, seed)
        self.grid, self.strict = (1, 1, 1), strict
        self._symbols = self._place()
        self.program = [self._decode(each) for each in self.kernel.instructions]
        self._segments: dict[int, tuple[list[Run], Instruction | None, int]] = {}
        self._starts = set(self.kernel.labels.values())
        self.block = Block(self, threads)

    def set_schedule(self, schedule: str, completion: str, seed: int = 0) -> None:
        """For the runs that follow; see the class."""
        if schedule not in ("in order", "random") or completion not in ("early", "late"):
            raise ValueError(f'schedule "{schedule}", completion "{completion}"')
        self.random, self.late, self.chance = schedule == "random", completion == "late", random.Random(seed)

    def _place(self) -> dict[str, NDArray]:
        places = {}
        variables = {**self.module.variables, **self.kernel.variables}
        shared_end = 0
        for name, variable in sorted(variables.items(), key=lambda item: item[1].size == 0):
            if variable.space == "shared":
                at = -(-shared_end // variable.align) * variable.align
                places[name] = at
                shared_end = at + variable.size
        self._globals = {}
        for name, variable in variables.items():
            if variable.space in ("global", "const"):
                data = bytes(variable.data).ljust(max(variable.size, 1), b"\0")
                self._globals[name] = torch.tensor(list(data), dtype=torch.uint8)
                places[name] = self._globals[name].data_ptr()
        for parameter in self.kernel.parameters:
            places[parameter.name] = PARAMETER_WINDOW + parameter.offset
        return {name: np.array([place], np.uint64) for name, place in places.items()}

    def address(self, symbol: str) -> NDArray[np.uint64]:
        if symbol not in self._symbols:
            raise PTXError(f"{symbol} is no variable of {self.kernel.name}")
        return self._symbols[symbol]

    def parameter(self, address: int) -> Any:
        """The argument whose parameter begins at this address."""
        for variable, argument in zip(self.kernel.parameters, self.arguments, strict=True):
            if variable.offset == address % PARAMETER_WINDOW:
                return argument
        raise PTXError(f"no parameter begins at {address:#x}")

    def _decode(self, instruction: Instruction) -> Run:
        if instruction.opcode in ("bra", "brx", "ret", "exit"):
            return _nothing
        decode = OPERATIONS.get(instruction.opcode)
        if decode is None:
            raise instruction.error("this opcode is not known to the simulator")
        try:
            run = decode(instruction)
        except (KeyError, IndexError, AttributeError) as error:
            raise instruction.error(f"this form is not known to the simulator ({error!r})") from error
        return run if instruction.predicate is None else _predicated(run, instruction)

    def segment(self, pc: int) -> tuple[list[Run], Instruction | None, int]:
        """What is run from here to the next place where threads may part, meet or wait; the branch; what follows."""
        found = self._segments.get(pc)
        if found is None:
            end = pc
            while True:
                if end >= len(self.program):
                    raise PTXError(f"{self.kernel.name} runs beyond its end")
                instruction = self.kernel.instructions[end]
                end += 1
                if instruction.opcode in _ENDS_RUN or end in self._starts:
                    break
            branches = instruction.opcode in ("bra", "brx", "ret", "exit")
            found = (self.program[pc : end - branches], instruction if branches else None, end)
            self._segments[pc] = found
        return found

    def run(self, grid: Sequence[int], arguments: Sequence[Any], tensors: Sequence[torch.Tensor] = ()) -> None:
        """Every block of the grid. `arguments` are tensors (their addresses), ints, floats, bytes (structures), or
        objects that instructions look up by address; `tensors` are those that only addresses in them lead to."""
        if len(arguments) != len(self.kernel.parameters):
            raise PTXError(f"{self.kernel.name} has {len(self.kernel.parameters)} parameters, not {len(arguments)}")
        self.arguments = arguments
        self.grid = (*grid, *[1] * (3 - len(grid)))  # type: ignore[assignment]
        end = max((each.offset + each.size for each in self.kernel.parameters), default=0)
        data = np.zeros(-(-max(end, 1) // 16) * 16, np.uint8)
        for variable, argument in zip(self.kernel.parameters, arguments, strict=True):
            value = _bytes_of(argument, variable.size)
            data[variable.offset : variable.offset + len(value)] = np.frombuffer(value, np.uint8)
        self.parameters = Space("parameter", [Region(data, 0, 0, len(data))])
        inner = [tensor for each in arguments for tensor in getattr(each, "tensors", ())]
        passed = [each for each in arguments if isinstance(each, torch.Tensor)]
        memory = of_tensors([*passed, *inner, *tensors, *self._globals.values()])
        with np.errstate(all="ignore"):
            for z, y, x in product(*map(range, reversed(self.grid))):
                self.block.begin((x, y, z), memory)
                self.block.go()


def _bytes_of(argument: Any, size: int) -> bytes:
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr().to_bytes(8, "little")
    if argument is None:
        return bytes(size)
    if isinstance(argument, bytes):
        return argument
    if isinstance(argument, float):
        return np.array([argument], np.float32 if size == 4 else np.float64).tobytes()
    if isinstance(argument, int):
        return (argument % 256**size).to_bytes(size, "little")
    return b""


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
