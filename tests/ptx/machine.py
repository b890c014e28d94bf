"""A GPU's block of threads on the CPU: PTX instructions, each run for many threads at once by numpy.

`Machine(module, name, threads, shared).run(grid, arguments)` runs a kernel, block after block. What is modelled is what
PTX promises: every thread's registers and its place in the program, warps that run in any order, barriers, memory that
only what was passed may be touched in, and operations that finish later than they began. Real tensor cores differ in
the last bits of one instruction; nothing here says anything about time.

Text becomes a `Module` (`parse`, `syntax`), each of its instructions a function of threads (`operations`, `operands`,
the families in `instructions`), which the `scheduler` calls for the `threads` of a `block` on its memory (`spaces`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from importlib import import_module
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.ptx.block import Block
from tests.ptx.operations import BRANCHES, Run, decoded
from tests.ptx.scheduler import Scheduler
from tests.ptx.spaces import PARAMETER_WINDOW, Region, Space, of_tensors
from tests.ptx.syntax import Instruction, Module, PTXError
from tests.ptx.threads import WARP

_ENDS_SEGMENT = BRANCHES | {"bar", "barrier", "mbarrier"}
for _family in (
    "arithmetic", "bits", "conversions", "memory", "lanes", "control", "tensor_core", "mbarrier", "copies",
    "register_pool",
):  # fmt: skip
    import_module(f"tests.ptx.instructions.{_family}")  # fills the table of operations


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
        self.set_schedule(schedule, completion, seed)
        self.grid, self.strict = (1, 1, 1), strict
        self._symbols = self._place()
        self.program = [decoded(each) for each in self.kernel.instructions]
        self._segments: dict[int, tuple[list[Run], Instruction | None, int]] = {}
        self._starts = set(self.kernel.labels.values())
        self.block = Block(self, threads)

    def set_schedule(self, schedule: str, completion: str, seed: int = 0) -> None:
        """For the runs that follow; see the class."""
        if schedule not in ("in order", "random") or completion not in ("early", "late"):
            raise ValueError(f'schedule "{schedule}", completion "{completion}"')
        self.random, self.late, self.chance = schedule == "random", completion == "late", random.Random(seed)

    def _place(self) -> dict[str, NDArray]:
        """[1] for each variable and parameter: its address. Global variables get memory of this process."""
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
        """[1]: where a variable is, in its space. Raises PTXError for what is none."""
        if symbol not in self._symbols:
            raise PTXError(f"{symbol} is no variable of {self.kernel.name}")
        return self._symbols[symbol]

    def parameter(self, address: int) -> Any:
        """The argument whose parameter begins at this address."""
        for variable, argument in zip(self.kernel.parameters, self.arguments, strict=True):
            if variable.offset == address % PARAMETER_WINDOW:
                return argument
        raise PTXError(f"no parameter begins at {address:#x}")

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
                if instruction.opcode in _ENDS_SEGMENT or end in self._starts:
                    break
            branches = instruction.opcode in BRANCHES
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
                Scheduler(self.block).go()


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
