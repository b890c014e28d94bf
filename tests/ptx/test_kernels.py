"""The kernels themselves in the simulator: in processes of their own, as kernels here are interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
SIMULATED, SUITE, HOPPER = "tests/ptx/kernels/test_", "tests/kernels/triton/test_", "tests/kernels/hopper/test_"
# Of tests/kernels/triton those whose tiles are production's, or whose lanes and warps the interpreter has not, in
# bfloat16 (dtype2) where there is a choice; all of it is `make test-simulated`, which takes minutes.
TESTS = {
    "attention": [
        f"{SIMULATED}attention.py",
        f"{SIMULATED}attention_cuda.py",
        f"{SUITE}attention_backward.py",
        "-k",
        "test_attention.py or (cuda and 128 and 300) or (production and dtype2)",
    ],
    "attention for Hopper": [f"{HOPPER}attention.py", f"{HOPPER}attention_backward.py", "-k", "not plain_triton"],
    "engine, products, rows": [
        f"{SIMULATED}engine.py",
        f"{SIMULATED}gluon.py",
        f"{SIMULATED}products.py",
        f"{SUITE}linear.py::test_every_tile_gives_the_same_bits",
        f"{SUITE}token_logprob.py::test_rows_are_invariant",
        f"{SUITE}sample_token.py::test_sampled_logprob_is_the_scored_one_bitwise",
        "-k",
        "not (every_tile and (dtype0 or dtype1))",
    ],
}


def run(name: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-p", "tests.ptx.plugin", "--tb=short", *TESTS[name]]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """Of what was asked for, one on each core at a time: a block of threads is simulated by one."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        asked = {item.name for item in request.session.items if item.path == request.path}
        yield {name: pool.submit(run, name) for name in TESTS if any(each.endswith(f"[{name}]") for each in asked)}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", TESTS)
def test_kernels_as_they_are_compiled(name: str, runs: dict[str, Future[subprocess.CompletedProcess[str]]]) -> None:
    done = runs[name].result()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
