"""Whole runs on several ranks: GRPO learns the same on any of them, a restart goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from engine import EngineConfig, ParallelConfig
from rl.config import EnvironmentConfig, NewModelConfig, ScheduleConfig, TrainConfig
from rl.fresh_model import write_fresh_model
from rl.loop import train
from rl.metrics import read_lines
from rl.run import Run
from tests.parallel.pool import Pool

ROOT = Path(__file__).resolve().parents[2]
SMALL = NewModelConfig(
    hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    head_dim=16, max_position_embeddings=128, initializer_range=0.1,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model") / "fresh"
    write_fresh_model(directory, SMALL, ["0123456789+="], seed=0)
    return str(directory)


def learn(
    model: str, run_dir: Path, parallel: ParallelConfig, steps: int = 4, env: str = "tests.rl.toy:Letters"
) -> float:
    """A run on these ranks; the reward of its last step."""
    config = TrainConfig(
        run_dir=str(run_dir), model=model, steps=steps, prompts_per_step=4, group_size=8, max_tokens=6,
        env=EnvironmentConfig(name=env), schedule=ScheduleConfig(learning_rate=1e-2), parallel=parallel,
        engine=EngineConfig(kv_tokens=4096, train_batch_tokens=1024, threads=1),
    )  # fmt: skip
    with Run(config) as run:
        train(run)
        run.engine.ranks.once(lambda: None)  # what rank 0 writes is there
    run.engine.close()
    return read_lines(run_dir / "metrics.jsonl")[-1]["reward"]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """What was written of each step, but for times and how much was packed where."""
    return [{k: v for k, v in line.items() if "second" not in k} for line in read_lines(run_dir / "metrics.jsonl")]


def weights(run_dir: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((run_dir / "checkpoint").glob("*.safetensors"))}


def test_two_replicas_learn_what_one_rank_does_bitwise(pool2: Pool, model: str, tmp_path: Path) -> None:
    pool2.run(learn, model, tmp_path / "two", ParallelConfig(dp=2, gradient_lanes=2))
    learn(model, tmp_path / "one", ParallelConfig(gradient_lanes=2))
    assert metrics(tmp_path / "two") == metrics(tmp_path / "one")
    assert weights(tmp_path / "two") == weights(tmp_path / "one")


def test_two_replicas_of_two_ranks_learn_what_one_such_replica_does_bitwise(
    pool2: Pool, pool4: Pool, model: str, tmp_path: Path
) -> None:
    pool4.run(learn, model, tmp_path / "four", ParallelConfig(dp=2, tp=2, gradient_lanes=2))
    pool2.run(learn, model, tmp_path / "two", ParallelConfig(dp=1, tp=2, gradient_lanes=2))
    assert metrics(tmp_path / "four") == metrics(tmp_path / "two")
    assert weights(tmp_path / "four") == weights(tmp_path / "two")
    assert all(line["max_abs_logprob_difference"] == 0.0 for line in metrics(tmp_path / "four"))


def test_a_pipeline_learns_what_one_rank_does_bitwise(pool2: Pool, model: str, tmp_path: Path) -> None:
    pool2.run(learn, model, tmp_path / "two", ParallelConfig(pp=2, micro_batches=3))
    learn(model, tmp_path / "one", ParallelConfig(micro_batches=3))
    assert metrics(tmp_path / "two") == metrics(tmp_path / "one")
    assert weights(tmp_path / "two") == weights(tmp_path / "one")


def test_reward_rises_on_two_replicas_of_two_ranks(pool4: Pool, model: str, tmp_path: Path) -> None:
    rewards = pool4.run(learn, model, tmp_path, ParallelConfig(dp=2, tp=2), steps=20)
    assert rewards == [rewards[0]] * 4 and rewards[0] > 0.5


def test_a_judge_who_never_says_the_same_twice_leaves_ranks_with_equal_weights(
    pool2: Pool, model: str, tmp_path: Path
) -> None:
    """Unequal ones would be refused by the exactness check, or by the comparison of what ranks ask for."""
    pool2.run(learn, model, tmp_path, ParallelConfig(dp=2), env="tests.parallel.test_rollouts:Judge")
    assert all(line["max_abs_logprob_difference"] == 0.0 and line["errored"] > 0 for line in metrics(tmp_path))


# ---- under torchrun ----


def torchrun(*arguments: str, ranks: int = 2, restarts: int = 0) -> list[str]:
    options = [f"--nproc-per-node={ranks}", "--standalone", f"--max-restarts={restarts}"]
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", "rl", *arguments]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}


@pytest.fixture
def letters(model: str, tmp_path: Path) -> Path:
    """A configuration file of a run that would take long."""
    file = tmp_path / "letters.toml"
    file.write_text(
        f'model = "{model}"\nsteps = 500\nprompts_per_step = 4\ngroup_size = 4\nmax_tokens = 6\nsave_every = 2\n'
        f'run_dir = "{tmp_path}/run"\n[env]\nname = "tests.rl.toy:Letters"\n[schedule]\nlearning_rate = 1e-2\n'
        "[engine]\nkv_tokens = 4096\nthreads = 1\n"
    )
    return file


def wait_for_steps(process: subprocess.Popen[str], run_dir: Path, steps: int) -> None:
    deadline = time.monotonic() + 90
    while len(read_lines(run_dir / "metrics.jsonl")) < steps:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended, or never began"
        time.sleep(0.05)


def test_an_interrupt_stops_all_ranks_after_the_same_step(letters: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        torchrun("train", str(letters)), cwd=ROOT, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for_steps(process, tmp_path / "run", 2)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    steps = len(read_lines(tmp_path / "run" / "metrics.jsonl"))
    assert f"saved at step {steps}; continue with" in out, errors
    overrides = [f"steps={steps + 1}", "--resume"]
    done = subprocess.run(
        torchrun("train", str(letters), *overrides), cwd=ROOT, env=ENVIRONMENT, capture_output=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == list(range(steps + 1))


def test_torchrun_starts_a_dead_rank_again_and_the_run_goes_on_from_its_state(letters: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        torchrun("train", str(letters), restarts=1), cwd=ROOT, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for_steps(process, tmp_path / "run", 3)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    reached = len(read_lines(tmp_path / "run" / "metrics.jsonl"))
    wait_for_steps(process, tmp_path / "run", reached + 3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    steps = [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert steps == list(range(len(steps))) and len(steps) >= reached + 3
