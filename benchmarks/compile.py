"""Every Triton kernel of a production model, compiled for GPUs that need not be here: registers, spills, shared memory,
matrix instructions.

    python -m benchmarks.compile --ops swiglu --targets sm_90 --dtypes bfloat16

What is compiled is what would be launched: see `benchmarks.compile_cases`. Exits with 1 where one spills
registers, wants more shared memory than a block has, or does not compile. Timings need the GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import product
from multiprocessing import get_context

import torch
from rich.console import Console
from rich.table import Table
from triton import compile as triton_compile
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.experimental.gluon._runtime import GluonASTSource

from benchmarks.compile_cases import DTYPES, CompileCase, collected
from engine.kernels.triton.launch import Launch

TARGETS = {"sm_90": (90, 132), "sm_100": (100, 148)}  # compute capability and multiprocessors: H100 or H200, and B200
SHARED_LIMIT = 232448  # bytes of shared memory that a block can have on both targets (227 KiB)
TENSOR_LIMIT = 512  # columns of tensor memory on sm_100


@dataclass(frozen=True)
class Job:
    """One kernel as it would be launched by an op in a model of the dtype, for one target."""

    launch: Launch
    op: str
    dtype: str
    target: str

    @property
    def kernel(self) -> str:
        """File and function: every file has a _forward."""
        return f"{self.launch.kernel.__module__.rsplit('.', 1)[-1]}.{self.launch.name}"


@dataclass(frozen=True)
class Record:
    """What the compiler made of a job. `wgmma` and `tcgen05` say whether these matrix instructions are in it,
    `serialized` whether ptxas had to wait after each wgmma, which may halve the speed of a product; `spills` are bytes
    that a thread stores and loads because registers ran out; `error` is why there is no kernel."""

    kernel: str
    op: str
    dtype: str
    target: str
    constants: dict[str, str]
    num_warps: int
    num_stages: int
    seconds: float
    registers: int = 0
    spills: int = 0
    shared_bytes: int = 0
    tensor_columns: int = 0
    wgmma: bool = False
    serialized: bool = False
    tcgen05: bool = False
    error: str = ""

    @property
    def fault(self) -> str:
        """Why the kernel will not do; empty where it will."""
        if self.error:
            return f"does not compile: {self.error}"
        if self.spills:
            return f"spills {self.spills} bytes a thread; smaller tiles or more warps need fewer registers"
        if self.serialized:
            return "waits after each wgmma (ptxas C7510 to C7515): something else writes to the registers of the sum"
        if self.shared_bytes > SHARED_LIMIT:
            return f"wants {self.shared_bytes} bytes of shared memory; a block has {SHARED_LIMIT}: take fewer stages"
        if self.tensor_columns > TENSOR_LIMIT:
            return f"wants {self.tensor_columns} columns of tensor memory; there are {TENSOR_LIMIT}: take smaller tiles"
        return ""


_jobs: list[Job] = []  # for the processes of the pool, which are forked: a kernel cannot be pickled


def jobs(cases: Sequence[CompileCase], dtypes: Sequence[torch.dtype], targets: Sequence[str]) -> list[Job]:
    """What each target would launch; each launch once, however many ops and dtypes come to it."""
    found: dict[str, Job] = {}
    for dtype, case, target in product(dtypes, cases, targets):
        capability, processors = TARGETS[target]
        for launch in collected(case, dtype, processors, capability // 10):
            code = (launch.kernel.__module__, launch.name, launch.signature, sorted(launch.constants.items()),
                    sorted(launch.divisible), launch.num_warps, launch.num_stages, target)  # fmt: skip
            found.setdefault(repr(code), Job(launch, case.op, str(dtype).removeprefix("torch."), target))
    return list(found.values())


def compiled_for(launch: Launch, capability: int) -> CompiledKernel:
    """The kernel as it would be compiled when it is launched on a GPU of this capability, such as 90."""
    source = (GluonASTSource if launch.gluon else ASTSource)(
        launch.kernel,
        launch.signature,
        launch.constants,
        {(launch.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible},
    )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": False}
    return triton_compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_job(job: Job) -> Record:
    """Compiles it, without Triton's cache: the assembler's report of registers is not kept there."""
    launch = job.launch
    constants = {name: _short(value) for name, value in launch.constants.items()}
    what = (job.kernel, job.op, job.dtype, job.target, constants, launch.num_warps, launch.num_stages)
    knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
    said, began = io.StringIO(), time.perf_counter()
    try:
        with contextlib.redirect_stdout(said):
            compiled = compiled_for(launch, TARGETS[job.target][0])
    except Exception as error:  # whatever the compiler finds wrong is this kernel's result
        return Record(*what, time.perf_counter() - began, error=_first_lines(error))
    seconds, report = time.perf_counter() - began, said.getvalue()
    ptx = compiled.asm["ptx"]
    return Record(
        *what,
        seconds,
        registers=max(_numbers(r"Used (\d+) registers", report)),
        spills=sum(_numbers(r"(\d+) bytes spill", report)),
        shared_bytes=compiled.metadata.shared,
        tensor_columns=getattr(compiled.metadata, "tmem_size", 0) or 0,
        wgmma="wgmma.mma_async" in ptx,
        serialized="wgmma.mma_async instructions are serialized" in report,
        tcgen05="tcgen05.mma" in ptx,
    )


def _numbers(pattern: str, report: str) -> list[int]:
    found = [int(number) for number in re.findall(pattern, report)]
    if not found:
        raise RuntimeError(f"ptxas reported nothing like {pattern!r}; it said: {report[:2000]}")
    return found


def _short(value: object) -> str:
    return getattr(value, "__name__", str(value))


def _first_lines(error: Exception) -> str:
    return f"{type(error).__name__}: " + " ".join(str(error).split())[:600]


def _nth(index: int) -> tuple[int, Record]:
    return index, compile_job(_jobs[index])


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=get_context("fork"))


def compile_all(work: Sequence[Job], workers: int) -> Iterator[Record]:
    """The records of `work`, in its order. A kernel that makes the compiler crash has an error like any other."""
    _jobs[:] = work
    done: dict[int, Record] = {}
    with _pool(workers) as pool:
        futures = [pool.submit(_nth, index) for index in range(len(work))]
        for future in as_completed(futures):
            with contextlib.suppress(BrokenProcessPool):  # by this one or another: those left are tried alone, below
                index, record = future.result()
                done[index] = record
                print(f"{len(done)}/{len(work)} {record.kernel} {record.dtype} {record.target} {record.seconds:.1f} s",
                      file=sys.stderr, flush=True)  # fmt: skip
    for index, job in enumerate(work):
        yield done[index] if index in done else _alone(index, job)


def _alone(index: int, job: Job) -> Record:
    try:
        with _pool(1) as pool:
            return pool.submit(_nth, index).result()[1]
    except BrokenProcessPool:
        launch = job.launch
        return Record(job.kernel, job.op, job.dtype, job.target, {}, launch.num_warps, launch.num_stages, 0.0,
                      error="the compiler crashed")  # fmt: skip


def show(records: Sequence[Record]) -> None:
    """The table, then what is wrong."""
    table = Table("op", "kernel", "dtype", "target", "constants", "warps", "stages")
    for title in ("registers", "spills", "shared", "seconds"):
        table.add_column(title, justify="right")
    table.add_column("matrix")
    for record in records:
        constants = " ".join(f"{name}={value}" for name, value in record.constants.items())
        matrix = "wgmma" if record.wgmma else "tcgen05" if record.tcgen05 else ""
        table.add_row(record.op, record.kernel, record.dtype, record.target, constants, str(record.num_warps),
                      str(record.num_stages), str(record.registers), str(record.spills), str(record.shared_bytes),
                      f"{record.seconds:.1f}", matrix, style="red" if record.fault else "")  # fmt: skip
    console = Console(width=max(160, Console().width))
    console.print(table)
    for record in records:
        if record.fault:
            console.print(
                f"{record.op}: {record.kernel} ({record.dtype}, {record.target}) {record.fault}", markup=False
            )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    parser.add_argument("--ops", help="comma-separated (default: every op that has Triton kernels)")
    parser.add_argument("--dtypes", default=",".join(names), help="comma-separated (default: %(default)s)")
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--cases", default="benchmarks.compile_cases", help="the module whose cases() are compiled")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    parser.add_argument("--list", action="store_true", help="only name the kernels, as JSON, and compile none")
    args = parser.parse_args(argv)
    args.cases = import_module(args.cases).cases()
    args.dtypes, args.targets = args.dtypes.split(","), args.targets.split(",")
    if args.ops:
        args.cases = [case for case in args.cases if case.op in args.ops.split(",")]
    for given, offered in ((args.dtypes, names), (args.targets, list(TARGETS))):
        for name in given:
            if name not in offered:
                parser.error(f'"{name}" is not offered; choose from {", ".join(offered)}')
    if not args.cases:
        parser.error(f'none of "{args.ops}" is an op with Triton kernels')
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, which leaves nothing to compile; unset it")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    work = jobs(args.cases, [getattr(torch, name) for name in args.dtypes], args.targets)
    if args.list:
        print(json.dumps(sorted({job.kernel for job in work})))
        return 0
    with tempfile.TemporaryDirectory() as cache:
        knobs.cache.dir = cache
        records = list(compile_all(work, args.workers))
    show(records)
    print(json.dumps([asdict(record) for record in records]), flush=True)
    return 1 if any(record.fault for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
