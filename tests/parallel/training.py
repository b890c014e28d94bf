"""A small training run to be killed: as a program for torchrun, and as ranks that a test starts itself.

DIRECTORY/state         after every step
DIRECTORY/losses.jsonl  {"step": 3, "loss": 1.25, "start": 0}, by rank 0; a step that was taken again is there again
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from engine import Engine, EngineConfig, ParallelConfig, Sample, times_restarted
from tests.parallel.pool import context
from tests.tiny import VOCAB_SIZE, tiny_config

SAMPLES = 8


def train(directory: Path, parallel: ParallelConfig, steps: int, die: tuple[int, int] | None = None) -> None:
    """Trains on all ranks, going on from the last complete state when torchrun started the ranks again. `die` is a
    rank, and the step at which it kills itself in the first start."""
    start = times_restarted()
    (directory / f"connected-{start}-{os.environ['RANK']}").touch()
    engine = Engine.from_config(tiny_config(), EngineConfig(dtype="float32", parallel=parallel), seed=1)
    state = directory / "state"
    resume = start > 0 and engine.ranks.once(lambda: Engine.has_state(state))
    step = engine.load_state(state)["step"] if resume else 0
    while step < steps:
        if start == 0 and die == (engine.mesh.rank, step):
            os.kill(os.getpid(), signal.SIGKILL)
        stats = engine.forward_backward(samples_of(step), "sft")
        engine.optim_step(1e-2)
        if engine.mesh.is_main:
            with (directory / "losses.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "loss": stats.loss, "start": start}) + "\n")
        step += 1
        engine.save_state(state, {"step": step})
    engine.close()


def samples_of(step: int) -> list[Sample]:
    """What is learnt in a step: a function of its number."""
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(4, 24, (SAMPLES,), generator=generator).tolist()
    rows = [torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]
    return [Sample(tokens=row, loss_mask=[0] + [1] * (len(row) - 1)) for row in rows]


def losses(directory: Path) -> dict[int, float]:
    """The loss of each step; one that was taken several times had the same each time."""
    found: dict[int, float] = {}
    for line in (directory / "losses.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert found.setdefault(record["step"], record["loss"]) == record["loss"], record
    return found


class Ranks:
    """Ranks started as torchrun's agent starts them: with its variables, and with its store, which outlives them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.starts = 0
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.workers: list[context.Process] = []  # type: ignore[name-defined]

    def start(self, size: int, steps: int, parallel: ParallelConfig) -> None:
        """Starts all ranks, for the first time or again."""
        self.workers = []
        for rank in range(size):
            variables = {
                "RANK": rank,
                "WORLD_SIZE": size,
                "LOCAL_WORLD_SIZE": size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": self._store.port,
                "TORCHELASTIC_RUN_ID": "test",
                "TORCHELASTIC_USE_AGENT_STORE": True,
                "TORCHELASTIC_RESTART_COUNT": self.starts,
                "GLOO_SOCKET_IFNAME": "lo",
            }
            environment = {key: str(value) for key, value in variables.items()}
            arguments = (environment, self.log(rank), self.directory, parallel, steps)
            self.workers.append(context.Process(target=_program, args=arguments, daemon=True))
        for worker in self.workers:
            worker.start()
        self.starts += 1

    def kill(self, rank: int) -> int:
        """kill -9; the process's number."""
        self.workers[rank].kill()
        return self.workers[rank].pid

    def connected(self) -> bool:
        """Whether all ranks of this start have found one another."""
        return len(list(self.directory.glob(f"connected-{self.starts - 1}-*"))) == len(self.workers)

    def wait(self, seconds: float) -> list[int | None]:
        """The exit codes of all ranks; None for one that did not end in time."""
        for worker in self.workers:
            worker.join(seconds)
        return [worker.exitcode for worker in self.workers]

    def close(self) -> None:
        """Ends what is left of them."""
        for worker in self.workers:
            worker.kill()
            worker.join()

    def log(self, rank: int) -> Path:
        """What a rank wrote on stderr in the last start."""
        return self.directory / f"rank-{rank}.log"


def _program(variables: dict[str, str], log: Path, *arguments: object) -> None:
    """One rank, with the ends that a program of its own would come to."""
    os.environ.update(variables)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code = 0
    try:
        train(*arguments)  # type: ignore[arg-type]
    except BaseException:
        code = 1
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    atexit._run_exitfuncs()
    os._exit(code)


if __name__ == "__main__":
    where, grid, count, victim, moment = sys.argv[1:]
    sizes = dict(item.split("=") for item in grid.split(","))
    train(
        Path(where), ParallelConfig(**{axis: int(size) for axis, size in sizes.items()}), int(count),
        (int(victim), int(moment)),
    )  # fmt: skip
