"""The kernels themselves in the simulator: in a process of its own, as kernels here are interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
TESTS = [
    ["tests/ptx/kernels"],
    ["tests/kernels/hopper"],
]


@pytest.mark.parametrize("tests", TESTS, ids=lambda tests: tests[0])
def test_kernels_as_compiled_for_hopper(tests: list[str]) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-p", "tests.ptx.plugin", "--durations=10", "--tb=short", *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
