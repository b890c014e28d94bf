"""Every Triton kernel compiles for the GPUs it is for; in processes of their own, as kernels here are interpreted."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "engine" / "kernels" / "triton"


def run(*options: str) -> tuple[int, Any, str]:
    """The exit status of `python -m benchmarks.compile`, the JSON of its last line, and all it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compile", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.strip().splitlines()[-1]), done.stdout


def launched_kernels() -> set[str]:
    """ "file.kernel" for every launch(kernel, ...) in the sources."""
    return {
        f"{path.stem}.{node.args[0].id}"
        for path in KERNELS.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "launch"
        if isinstance(node.args[0], ast.Name)
    }


def test_every_kernel_that_is_launched_is_compiled() -> None:
    status, listed, _ = run("--list")
    assert status == 0
    assert launched_kernels() <= set(listed)


def test_every_kernel_compiles_for_hopper_and_blackwell_without_spills() -> None:
    status, records, output = run("--dtypes=bfloat16")
    assert status == 0, output[-6000:]
    assert {record["target"] for record in records} == {"sm_90", "sm_100"}
    assert all(record["registers"] > 0 and not record["spills"] for record in records)


@pytest.fixture(scope="module")
def planted() -> tuple[int, Any, str]:
    return run("--cases=tests.benchmarks.planted_kernels", "--dtypes=float32", "--targets=sm_90")


@pytest.mark.parametrize(
    "complaint",
    [
        "_spilling (float32, sm_90) spills",
        "_greedy (float32, sm_90) wants 524288 bytes of shared memory; a block has 232448",
        "_wrong (float32, sm_90) does not compile: CompilationError",
        "_crash (float32, sm_90) does not compile: the compiler crashed",
    ],
)
def test_planted_fault_is_reported(complaint: str, planted: tuple[int, Any, str]) -> None:
    status, _, output = planted
    assert status == 1
    assert complaint in " ".join(output.split())


def test_one_crash_leaves_the_other_kernels_their_records(planted: tuple[int, Any, str]) -> None:
    _, records, output = planted
    sound = next(record for record in records if record["op"] == "sound")
    assert sound["kernel"] == "planted_kernels._sound" and sound["registers"] > 0 and not sound["error"]
    assert len(records) == 5 and "_sound (float32" not in output


@pytest.mark.parametrize(
    "fault", [{}, {"error": "no"}, {"spills": 4}, {"shared_bytes": 232449}, {"tensor_columns": 513}]
)
def test_any_fault_is_one(fault: dict[str, Any]) -> None:
    from benchmarks.compile import Record

    assert bool(Record("k", "op", "bfloat16", "sm_90", {}, 4, 2, 0.1, **fault).fault) is bool(fault)
