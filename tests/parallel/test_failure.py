"""Ranks that are killed in the middle of a training: the others end soon and say who died, and nothing is lost."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine import ParallelConfig
from tests.parallel.training import Ranks, losses

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    """Ranks that train in the test's directory."""
    found = Ranks(tmp_path)
    yield found
    found.close()


def uninterrupted(directory: Path, size: int, steps: int, parallel: ParallelConfig) -> dict[int, float]:
    directory.mkdir()
    ranks = Ranks(directory)
    ranks.start(size, steps, parallel)
    assert ranks.wait(60) == [0] * size, [ranks.log(rank).read_text() for rank in range(size)]
    return losses(directory)


def lines(directory: Path) -> int:
    file = directory / "losses.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.002)


def kill_at_random(ranks: Ranks, victim: int, draw: random.Random) -> None:
    """Kills one rank while it makes its groups and its model, loads, steps, or saves; the others must end in time and
    name it."""
    size = len(ranks.workers)
    wait_until(ranks.connected)
    time.sleep(draw.uniform(0.0, 0.5))
    assert ranks.workers[victim].is_alive(), ranks.log(victim).read_text()
    pid = ranks.kill(victim)
    killed = time.monotonic()
    codes = ranks.wait(30)
    assert time.monotonic() - killed < 30
    logs = [ranks.log(rank).read_text() for rank in range(size)]
    assert codes == [-9 if rank == victim else 1 for rank in range(size)], logs
    for rank in set(range(size)) - {victim}:
        assert f"rank {victim} (host {os.uname().nodename}, pid {pid}) died; rank " in logs[rank], logs[rank]


@pytest.mark.parametrize(
    ("size", "parallel", "kills"),
    [(2, ParallelConfig(dp=2), 5), (2, ParallelConfig(tp=2), 3), (4, ParallelConfig(dp=2, tp=2), 2)],
    ids=["dp2", "tp2", "dp2-tp2"],
)
def test_rank_killed_at_a_random_moment_ends_the_others_and_nothing_is_lost(
    ranks: Ranks, tmp_path: Path, size: int, parallel: ParallelConfig, kills: int
) -> None:
    """Each start is killed a few steps on and the next goes on from the last complete state; in the end the losses are
    those of a run that was never killed, to the bit."""
    steps = 6 * kills
    draw = random.Random(f"{parallel}")
    for number in range(kills):
        ranks.start(size, 1000, parallel)
        kill_at_random(ranks, (number + 1) % size, draw)
    ranks.start(size, steps, parallel)
    assert ranks.wait(60) == [0] * size, [ranks.log(rank).read_text() for rank in range(size)]
    expected = uninterrupted(tmp_path / "whole", size, steps, parallel)
    found = losses(tmp_path)
    assert {step: found[step] for step in expected} == expected


def test_fewer_data_parallel_ranks_go_on_along_the_same_curve(ranks: Ranks, tmp_path: Path) -> None:
    """A rank is lost for good: the one that is left takes over both gradient lanes, which the state knows of."""
    ranks.start(2, 1000, ParallelConfig())
    wait_until(lambda: lines(tmp_path) > 2)
    kill_at_random(ranks, 1, random.Random(7))
    steps = max(losses(tmp_path)) + 5
    ranks.start(1, steps, ParallelConfig())
    assert ranks.wait(60) == [0], ranks.log(0).read_text()
    expected = uninterrupted(tmp_path / "whole", 2, steps, ParallelConfig())
    found = losses(tmp_path)
    assert {step: found[step] for step in expected} == expected


def test_torchrun_starts_the_ranks_again_and_they_go_on(tmp_path: Path) -> None:
    """`torchrun --max-restarts=1`, of which rank 1 is killed in step 3: as if nothing had happened."""
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1", "-m",
         "tests.parallel.training", str(tmp_path), "dp=2", "6", "1", "3"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "rank 1 (host" in run.stderr and "died; rank 0 was in" in run.stderr, run.stderr
    starts = [line.rpartition(":")[2].strip(" }") for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert starts == ["0"] * 3 + ["1"] * 3
    assert losses(tmp_path) == uninterrupted(tmp_path / "whole", 2, 6, ParallelConfig(dp=2))
