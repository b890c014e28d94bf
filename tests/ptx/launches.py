"""Public ops on CPU tensors, by what the compiler makes of their kernels for Hopper: `with simulated(): ...`.

Every launch is compiled as it would be for the GPU (`benchmarks.compile.compiled_for`), tiles and all, and its PTX run
by `tests.ptx.machine`; the op goes on with what it left in memory. Not in a process whose kernels are interpreted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton
from triton import knobs

from benchmarks.compile import compiled_for
from engine.kernels.op import use_backend
from engine.kernels.triton.launch import Launch, running
from tests.ptx.instructions.tensor_map import expanded
from tests.ptx.machine import Machine
from tests.ptx.parse import parse
from tests.ptx.syntax import PTXError

CAPABILITY, PROCESSORS = 90, 4  # few multiprocessors, so that persistent kernels have several items a program
_STRICT = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)  # see Machine
_machines: dict[str, tuple[Machine, Any]] = {}


@contextmanager
def _without_assembler() -> Iterator[None]:
    """The compiler stops at PTX, which saves time; such kernels, which no GPU can run, have a cache of their own."""

    def stages_of(backend: Any = None, stages: dict[str, Any] | None = None, *_: Any) -> tuple[str, str]:
        if stages is not None:
            stages["cubin"] = lambda source, metadata: b""
        return "simulated", "simulated"  # what the compiler names them by, when it asks without arguments

    with knobs.runtime.scope(), knobs.cache.scope():
        knobs.cache.dir = os.path.join(knobs.cache.dir, "simulated")
        knobs.runtime.add_stages_inspection_hook = stages_of
        yield


class Simulator:
    """Runs launches; `launches` are those so far. See `Machine` for the options."""

    def __init__(self, schedule: str = "in order", completion: str = "early", seed: int = 0) -> None:
        self.schedule, self.completion, self.seed = schedule, completion, seed
        self.launches: list[Launch] = []

    def __call__(self, launch: Launch, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        self.launches.append(launch)
        machine, metadata = machine_of(launch)
        machine.set_schedule(self.schedule, self.completion, self.seed)
        # Constants are no parameters; the compiler's own two, for scratch memory, come last and are not used.
        given = [value for name, value in zip(launch.kernel.arg_names, arguments, strict=False)
                 if launch.signature[name] != "constexpr"]  # fmt: skip
        given = expanded(given, getattr(metadata, "tensordesc_meta", None) or ())
        scratch = [None] * (len(machine.kernel.parameters) - len(given))
        machine.run(grid, [*given, *scratch])


@contextmanager
def simulated(
    schedule: str = "in order", completion: str = "early", seed: int = 0, backend: str = "triton"
) -> Iterator[list[Launch]]:
    """Ops run on the backend of this name (see `use_backend`) in the simulator; yields what was launched so far."""
    simulator = Simulator(schedule, completion, seed)
    with use_backend(backend), running(simulator, PROCESSORS, CAPABILITY // 10):
        yield simulator.launches


def machine_of(launch: Launch) -> tuple[Machine, Any]:
    """The kernel, compiled and decoded once in a process for what its code depends on, and the compiler's metadata."""
    key = repr((launch.kernel.__module__, launch.name, launch.signature, sorted(launch.constants.items()),
                sorted(launch.divisible), launch.num_warps, launch.num_stages))  # fmt: skip
    if key not in _machines:
        with _without_assembler():
            compiled = compiled_for(launch, CAPABILITY)
        module, metadata = parse(compiled.asm["ptx"]), compiled.metadata
        (name,) = module.kernels
        threads = module.kernels[name].threads
        if threads is None:
            raise PTXError(f"{name} does not say how many threads a block has")
        _machines[key] = Machine(module, name, threads, metadata.shared, strict=_STRICT or launch.gluon), metadata
    return _machines[key]
