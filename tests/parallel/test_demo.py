"""The demo on several ranks: it is the same program, and what it learns is the same."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from rl.metrics import read_lines
from tests.parallel.test_runs import ENVIRONMENT, ROOT, torchrun
from tests.rl.test_cli import TINY

# The corpus, the model, the fine-tuning and each GRPO step are the demo's. It takes 12 of these instead of 40, and is
# measured on 256 problems instead of 512.
SHORTER = ["sft.evaluation.every=300", "sft.evaluation.problems=64", "train.steps=12", "train.evaluation.every=12",
           "train.evaluation.problems=256"]  # fmt: skip


def summary_of(command: list[str], directory: Path) -> dict[str, Any]:
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads((directory / "summary.json").read_text())


def test_the_demo_runs_under_torchrun(tmp_path: Path) -> None:
    command = torchrun("demo", "--dir", str(tmp_path / "demo"), *TINY)
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["rl_steps"] == 2 and summary["max_abs_logprob_difference"] == 0.0
    assert [line["step"] for line in read_lines(tmp_path / "demo" / "metrics.jsonl")] == [0, 1]
    assert done.stdout.count("talk to it") == 1  # one rank speaks
    assert (tmp_path / "demo" / "report.html").exists()


def test_grpo_of_the_demo_learns_the_same_on_two_replicas_of_two_ranks(tmp_path: Path) -> None:
    """From one fine-tuned model: a second fine-tuning would say nothing more, and take longer than all the rest.

    Measured, accuracy with thinking: 42.2% -> 99.2% on one process and on four, whose bits differ (tp sums by rank);
    with other seeds for fine-tuning and GRPO 49.2% -> 93.0%; a model that was fine-tuned for 200 steps came from 50.8%
    to 82.4, 84.0, 85.2 and 85.9% with four GRPO seeds. So a rise of 30 points is far from luck, and 8 points are twice
    what another path of the same training made.
    """
    one, four = tmp_path / "one", tmp_path / "four"
    alone = summary_of([sys.executable, "-m", "rl", "demo", "--dir", str(one), *SHORTER], one)
    for stage in ("corpus", "sft"):
        shutil.copytree(one / stage, four / stage)
    mesh = ["train.parallel.dp=2", "train.parallel.tp=2"]
    shared = summary_of(torchrun("demo", "--resume", "--dir", str(four), *SHORTER, *mesh, ranks=4), four)
    for summary in (alone, shared):
        assert summary["max_abs_logprob_difference"] == 0.0 and summary["checked_tokens"] > 50_000
        assert summary["rl_steps"] == 12 and summary["held_out_problems"] == 256
        assert summary["accuracy_think_after"] > summary["accuracy_think_before"] + 0.3
    assert abs(shared["accuracy_think_before"] - alone["accuracy_think_before"]) < 0.05
    assert abs(shared["accuracy_think_after"] - alone["accuracy_think_after"]) < 0.08
