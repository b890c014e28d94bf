"""The kernels themselves in the simulator: in a process of its own, as kernels here are interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
SUITE = "tests/kernels/triton/test_"
# Those of tests/kernels/triton that have tiles of production, or a schedule of threads that the interpreter has not; the
# rest is `make test-simulated`, which takes minutes.
TESTS = {
    "attention": ["tests/ptx/kernels/test_attention.py"],
    "decode in CUDA C++": ["tests/ptx/kernels/test_cuda_decode.py"],
    "attention backward": [f"{SUITE}attention_backward.py::test_tiles_of_production"],
    "rows": [
        f"{SUITE}swiglu.py",
        f"{SUITE}rms_norm.py",
        f"{SUITE}linear.py::test_every_tile_gives_the_same_bits",
        f"{SUITE}token_logprob.py::test_gradients_are_those_of_the_definition_in_double",
        f"{SUITE}token_logprob.py::test_rows_are_invariant",
        f"{SUITE}sample_token.py::test_sampled_logprob_is_the_scored_one_bitwise",
    ],
}


@pytest.mark.parametrize("name", TESTS)
def test_kernels_as_compiled_for_hopper(name: str) -> None:
    """In bfloat16 alone, where there is a choice."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-p", "tests.ptx.plugin", "--tb=short", *TESTS[name]]
    command += ["-k", "not dtype0 and not dtype1"] if "kernels/triton" in TESTS[name][0] else []
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
