"""One model on 1 to 4 ranks: tokens per second of sampling and training, and where the rest of the time went.

    python -m benchmarks.scaling --model llama-15m --meshes dp2,tp2,pp2,dp2xtp2

Each mesh is started through torchrun, on this machine. Its ceiling is one process that has as many cores as its ranks
have together and sends nothing to anybody; that is measured too. Where there are more ranks than cores, they take turns
on these and the figures tell of correctness only. `communication` is the share of the time that ranks are in
collectives (of replicas, tensor and context parallel ranks), `waiting` that for the stage before or after, and `bubble`
what the schedule alone would leave idle.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import cli, machine
from benchmarks.project import Project
from benchmarks.table import aligned, figure
from benchmarks.timing import seconds
from benchmarks.workloads import generation, training_sequences
from engine import ParallelConfig
from engine.parallel import collectives
from engine.parallel.collectives import Group
from engine.parallel.schedule import bubble_fraction, schedule

MESHES = "dp1,dp2,tp2,pp2,cp2,dp4,dp2xtp2,dp2xpp2,tp2xpp2"
AXES = ("dp", "pp", "cp", "tp")
TIMEOUT_SECONDS = 1800.0
HEADER = ["mesh", "ranks x threads", "sampling tok/s", "of ceiling", "communication", "waiting",
          "training tok/s", "of ceiling", "communication", "waiting", "bubble"]  # fmt: skip


@dataclass(frozen=True)
class Figures:
    """What one mesh does; shares are of the time, averaged over ranks."""

    tokens_per_second: list[float]  # of each timed run
    communication: float
    waiting: float
    idle: float  # of the schedule: turns or time without work

    @property
    def value(self) -> float:
        return statistics.median(self.tokens_per_second)


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    own, rest = _own_options(arguments)
    args = cli.parse(__doc__ or "", rest)
    if own.result is not None:  # a rank of one mesh
        _measure(own.mesh, args, own.result, own.threads)
        return None
    limits = machine.measure(args.quick)
    cores = len(os.sched_getaffinity(0))
    rows: list[dict[str, Any]] = []
    ceilings: dict[int, dict[str, Figures]] = {}
    for name in own.meshes.split(","):
        ranks = number_of_ranks(mesh_config(name))
        threads = max(1, cores // ranks)
        used = min(cores, ranks * threads)
        if used not in ceilings:
            ceilings[used] = _run("dp1", 1, used, rest)
        figures = ceilings[used] if (name, threads) == ("dp1", used) else _run(name, ranks, threads, rest)
        rows.append(_row(name, ranks, threads, figures, ceilings[used], cores))
    result = {
        "benchmark": "scaling",
        "model": args.model,
        "dtype": args.dtype,
        "machine": limits.as_json(),
        "cores": cores,
        "ceiling": "one process with as many cores",
        "rows": rows,
    }
    print(f"scaling, {args.model}. {limits.describe()}\n\n{aligned(HEADER, [_cells(row) for row in rows])}\n")
    crowded = [row["mesh"] for row in rows if row["more_ranks_than_cores"]]
    if crowded:
        print(f"{', '.join(crowded)}: more ranks than the {cores} cores; these figures show correctness, not speed\n")
    print(json.dumps(result), flush=True)
    return result


def mesh_config(name: str) -> ParallelConfig:
    """The mesh called "dp2xtp2", say; axes that are not named have one rank. Raises ValueError."""
    found = {"dp": 1}
    for part in name.split("x"):
        match = re.fullmatch(rf"({'|'.join(AXES)})(\d+)", part)
        if match is None:
            raise ValueError(f'"{part}" of the mesh "{name}" is not an axis ({", ".join(AXES)}) and a number of ranks')
        found[match[1]] = int(match[2])
    return msgspec.convert(found, ParallelConfig)


def number_of_ranks(mesh: ParallelConfig) -> int:
    return mesh.dp * mesh.pp * mesh.cp * mesh.tp


def _own_options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--meshes", default=MESHES)
    parser.add_argument("--mesh", default="dp1", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_known_args(arguments)


def _run(mesh: str, ranks: int, threads: int, arguments: list[str]) -> dict[str, Figures]:
    """Starts the ranks of a mesh and waits for their figures. Raises RuntimeError with what a rank said."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        worker = ["-m", "benchmarks.scaling", f"--mesh={mesh}", f"--threads={threads}", f"--result={file}", *arguments]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *launcher, *worker], env=environment, capture_output=True, text=True,
            timeout=TIMEOUT_SECONDS,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"the ranks of {mesh} ended with exit code {done.returncode}:\n{done.stderr[-4000:]}")
        return {job: Figures(**figures) for job, figures in json.loads(file.read_text()).items()}


def _measure(mesh: str, args: argparse.Namespace, result: Path, threads: int) -> None:
    """One rank's part: both jobs, timed together with all other ranks."""
    parallel = mesh_config(mesh)
    work = generation("W2", args.config, args.scale)
    sequences = training_sequences("TR", args.config, args.scale)
    project = Project(args.config, [work], args.dtype, parallel=parallel, threads=threads)
    ranks = project.engine.ranks
    found: dict[str, dict[str, Any]] = {}

    def job(name: str, run: Callable[[], object], tokens: int, idle: Callable[[], float]) -> None:
        run()  # warm-up
        taken: list[float] = []
        spent: dict[str, float] = defaultdict(float)
        for _ in range(args.repeats):
            ranks.gather(None)  # all begin together
            with timed_collectives(spent):
                taken.append(seconds(run))
        total = sum(taken)
        shares = [
            sum(values) / ranks.count
            for values in zip(*ranks.gather((_other(spent) / total, spent["pp"] / total)), strict=True)
        ]
        found[name] = {
            "tokens_per_second": [tokens / each for each in taken],
            "communication": shares[0],
            "waiting": shares[1],
            "idle": idle(),
        }

    stats = project.engine.sampler.stats
    job("sampling", lambda: project.generate(work), work.output_tokens,
        lambda: stats.idle_turns / max(1, stats.idle_turns + stats.steps))  # fmt: skip
    plan = schedule(parallel.schedule, parallel.pp, parallel.least_micro_batches, parallel.chunks_per_stage)
    job("training", lambda: project.train_step(sequences), sum(map(len, sequences)), lambda: bubble_fraction(plan))
    ranks.once(lambda: result.write_text(json.dumps(found)))
    project.engine.close()


@contextmanager
def timed_collectives(spent: dict[str, float]) -> Iterator[None]:
    """Within the block, adds the seconds that this rank spends in collectives to `spent`, by the name of the group."""
    original = collectives.named

    @contextmanager
    def timed(what: str, group: Group) -> Iterator[None]:
        start = time.perf_counter()
        try:
            with original(what, group):
                yield
        finally:
            spent[group.name] += time.perf_counter() - start

    collectives.named = timed
    try:
        yield
    finally:
        collectives.named = original


def _other(spent: dict[str, float]) -> float:
    return sum(value for group, value in spent.items() if group != "pp")


def _row(
    mesh: str, ranks: int, threads: int, figures: dict[str, Figures], ceiling: dict[str, Figures], cores: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"mesh": mesh, "ranks": ranks, "threads": threads, "more_ranks_than_cores": ranks > cores}
    for job, each in figures.items():
        row[job] = {
            "tokens_per_second": each.value,
            "runs": each.tokens_per_second,
            "ceiling": ceiling[job].value,
            "share_of_ceiling": each.value / ceiling[job].value,
            "communication": each.communication,
            "waiting": each.waiting,
            "bubble": each.idle,
        }
    return row


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [row["mesh"], f"{row['ranks']} x {row['threads']}"]
    for job in ("sampling", "training"):
        each = row[job]
        cells.append(figure(each["tokens_per_second"]))
        cells += [f"{each[key]:.0%}" for key in ("share_of_ceiling", "communication", "waiting")]
    return [*cells, f"{row['training']['bubble']:.0%}"]


if __name__ == "__main__":
    main()
