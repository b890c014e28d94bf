"""Triton's kernels compile for GPUs that are not here; in processes of their own, as kernels here are interpreted."""

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
KERNELS = [ROOT / "engine" / "kernels" / language for language in ("triton", "hopper")]


def run(*options: str) -> tuple[int, Any, str]:
    """The exit status of `python -m benchmarks.compile`, the JSON of its last line, and all it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compile", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.strip().splitlines()[-1]), done.stdout


def _is_jitted(function: ast.FunctionDef) -> bool:
    named = (ast.unparse(decorator) for decorator in function.decorator_list)
    return any("triton.jit" in name or "gluon.jit" in name for name in named)


def launched_kernels() -> set[str]:
    """ "file.kernel" for every @triton.jit or @gluon.jit function that no other calls: those that are launched."""
    jitted = [
        (path.stem, node)
        for folder in KERNELS
        for path in folder.glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and _is_jitted(node)
    ]
    names = {(stem, function.name) for stem, function in jitted}
    called = {
        (stem if (stem, node.id) in names else other, node.id)
        for stem, function in jitted
        for node in ast.walk(function)
        if isinstance(node, ast.Name)
        for other, _ in jitted
    }
    return {f"{stem}.{name}" for stem, name in names - called}


def test_every_kernel_that_is_launched_is_compiled() -> None:
    status, listed, _ = run("--list")
    assert status == 0
    assert launched_kernels() == set(listed)


@pytest.fixture(scope="module")
def bfloat16() -> tuple[int, Any, str]:
    """In one dtype, 8-bit pages among it: all of them are `make compile-gpu`, which takes minutes."""
    return run("--dtypes=bfloat16", "--targets=sm_90,sm_100")


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_every_kernel_compiles_without_spills(target: str, bfloat16: tuple[int, Any, str]) -> None:
    status, records, output = bfloat16
    assert status == 0, output[-6000:]
    mine = [record for record in records if record["target"] == target]
    assert all(record["registers"] > 0 and record["spills"] == 0 for record in mine)
    plain, hopper = ({path.stem for path in folder.glob("*.py")} for folder in KERNELS)
    absent = hopper - plain if target == "sm_100" else set()
    assert {record["kernel"] for record in mine} == {
        kernel for kernel in launched_kernels() if kernel.split(".")[0] not in absent
    }


def test_products_for_hopper_are_wgmma(bfloat16: tuple[int, Any, str]) -> None:
    _, records, _ = bfloat16
    multiply = {"linear._multiply", "attention._attend", "attention_backward._grad_queries", "attention_walk.walk"}
    assert multiply <= {record["kernel"] for record in records if record["wgmma"]}


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
    "fault",
    [{}, {"error": "no"}, {"spills": 4}, {"serialized": True}, {"shared_bytes": 232449}, {"tensor_columns": 513}],
)
def test_any_fault_is_one(fault: dict[str, Any]) -> None:
    from benchmarks.compile import Record

    assert bool(Record("k", "op", "bfloat16", "sm_90", {}, 4, 2, 0.1, **fault).fault) is bool(fault)
