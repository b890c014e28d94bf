"""What examples and documents tell a reader to type: torchrun takes it, and so do our command lines."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from rl.__main__ import parser

ROOT = Path(__file__).resolve().parents[1]
SLURM = ROOT / "examples" / "slurm.sbatch"
FAKES = {
    "scontrol": 'test "$1 $2" = "show hostnames"; echo node17; echo node18',
    "srun": 'printf "%s\\n" "$@"',
}


def sbatch(directory: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the batch script with commands in the place of Slurm's that show what they were given."""
    for name, body in FAKES.items():
        (directory / name).write_text(f"#!/bin/sh\n{body}\n")
        (directory / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[17-18]", "SLURM_JOB_ID": "123456", "SLURM_NNODES": "2", **variables}
    environment = {"PATH": f"{directory}:{os.environ['PATH']}", **job}
    return subprocess.run(["bash", str(SLURM), *arguments], env=environment, capture_output=True, text=True)


def torchrun(words: list[str]) -> argparse.Namespace:
    """The arguments as torchrun understands them; those for the module are in `training_script_args`."""
    return get_args_parser().parse_args(words)


def documented() -> list[tuple[str, str]]:
    """Every whole torchrun line of the README and the documents, without its prompt and what a comment adds."""
    found = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text().replace("\\\n", " ")
        lines = re.findall(r"^\s*\$?\s*torchrun (.+)$", text, re.M) + re.findall(r"`torchrun (-[^`]+)`", text)
        found += [(path.name, re.sub(r"\s+#.*$", "", line)) for line in lines if " -m " in line]
    return found


def test_bash_parses_the_batch_script() -> None:
    done = subprocess.run(["bash", "-n", str(SLURM)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_torchrun_takes_what_the_batch_script_gives_it(tmp_path: Path) -> None:
    words = sbatch(tmp_path, "run.toml", "parallel.tp=8", SLURM_GPUS_ON_NODE="8").stdout.splitlines()
    srun, command = words[: words.index("torchrun")], words[words.index("torchrun") + 1 :]
    assert srun == ["--no-kill", "--kill-on-bad-exit=0"]
    given = torchrun(command)
    assert (given.nnodes, given.nproc_per_node, given.max_restarts) == ("2:2", "8", 3)
    assert (given.rdzv_backend, given.rdzv_endpoint, given.rdzv_id) == ("c10d", "node17:23456", "123456")
    assert given.module and given.training_script == "rl"
    ours = parser().parse_args(given.training_script_args)
    assert (ours.config, ours.overrides, ours.resume) == ("run.toml", ["parallel.tp=8"], False)


def test_batch_job_that_was_requeued_resumes(tmp_path: Path) -> None:
    words = sbatch(tmp_path, "run.toml", SLURM_RESTART_COUNT="1", MIN_NODES="1", RANKS_PER_NODE="4").stdout.splitlines()
    given = torchrun(words[words.index("torchrun") + 1 :])
    assert (given.nnodes, given.nproc_per_node) == ("1:2", "4")
    assert parser().parse_args(given.training_script_args).resume


def test_batch_script_without_a_configuration_says_how_it_is_used(tmp_path: Path) -> None:
    done = sbatch(tmp_path)
    assert done.returncode == 2 and "usage: sbatch" in done.stderr and not done.stdout


@pytest.mark.parametrize(("where", "line"), documented(), ids=lambda text: text[:60])
def test_documented_torchrun_line_is_accepted(where: str, line: str) -> None:
    given = torchrun(shlex.split(line))
    assert given.module and given.training_script in ("rl", "benchmarks.scaling"), line
    if given.training_script == "rl":
        parser().parse_args(given.training_script_args)
