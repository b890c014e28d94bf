"""Who is served by attention for Hopper, and what it launches; tests/kernels/hopper has what it computes. Kernels here
are interpreted, which Gluon's cannot be, so launches are noted in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import ConfigError
from engine.kernels.attention import AttentionSpec, attention
from engine.kernels.op import OPS, use_backend
from engine.kernels.rope import rope_table
from engine.kernels.swiglu import swiglu
from tests.kernels.cases import randn
from tests.kernels.test_attention import plan_of
from tests.kernels.triton.cases import needs_triton

GPU = torch.cuda.is_available()
ROOT = Path(__file__).resolve().parents[2]
HOPPER = next(backend for backend in OPS["attention"].backends if backend.name == "hopper")


def test_it_serves_only_when_it_is_asked_for() -> None:
    names = [backend.name for backend in OPS["attention"].backends]
    assert names.index("triton") < names.index("hopper")
    assert not HOPPER.proven
    assert all(backend.name != "hopper" for backend in OPS["attention_e4m3"].backends)


@needs_triton
@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_the_interpreter_is_refused_by_name() -> None:
    qkv, spec = randn(1, 256).to(torch.bfloat16), AttentionSpec(2, 1, 64)
    with use_backend("hopper"), pytest.raises(ConfigError, match="interpreter does not run Gluon"):
        attention(qkv, spec, rope_table(64, 1e4, None, 8), plan_of([1], [1]))


@needs_triton
@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_other_ops_run_on_triton_beside_it() -> None:
    x = randn(3, 8)
    with use_backend("triton"):
        expected = swiglu(x)
    with use_backend("hopper"):
        assert torch.equal(swiglu(x), expected)


NOTED = """
import json, sys
import torch
from engine.errors import ConfigError
from engine.kernels.attention import AttentionPlan, AttentionSpec, attention
from engine.kernels.op import use_backend
from engine.kernels.triton.launch import collecting

heads, kv_heads, width, dtype, major, e4m3 = json.loads(sys.argv[1])
spec = AttentionSpec(heads, kv_heads, width, kv_dtype=torch.float8_e4m3fn if e4m3 else None)
qkv = torch.empty(200, spec.row_size, dtype=getattr(torch, dtype))
with use_backend("hopper"), collecting(major=major) as launches:
    try:
        attention(qkv, spec, torch.empty(200, width), AttentionPlan.of_sequences([199, 1]))
    except ConfigError as error:
        print(json.dumps(str(error)))
        sys.exit()
print(json.dumps([[each.name, each.constants.get("CONSUMERS"), each.signature.get("q_map", "")] for each in launches]))
"""


def noted(*case: Any) -> Any:
    """Launches, or the error, of attention of so many heads, key/value heads and columns, on a GPU of a capability."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", NOTED, json.dumps(case)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_triton
@pytest.mark.skipif(GPU, reason="there is a GPU")
@pytest.mark.parametrize(
    ("case", "complaint"),
    [
        ((8, 2, 128, "float32", 9, False), "it computes in bfloat16 and float16, not in float32"),
        ((8, 2, 128, "bfloat16", 10, False), "it is for compute capability 9; this GPU has 10"),
    ],
)
def test_what_it_does_not_take_is_refused_by_name(case: tuple[Any, ...], complaint: str) -> None:
    assert complaint in noted(*case)


@needs_triton
@pytest.mark.skipif(GPU, reason="there is a GPU")
@pytest.mark.parametrize(
    ("case", "walks", "by_copy"),
    [
        ((8, 2, 128, "bfloat16", 9, False), [2, 1], True),
        ((6, 2, 64, "float16", 9, False), [2, 1], False),  # 3 query heads a key head do not divide 64
        ((4, 4, 96, "bfloat16", 9, False), [2, 1], True),
        ((8, 2, 256, "bfloat16", 9, False), [], False),  # too wide: plain Triton
        ((8, 2, 128, "bfloat16", 9, True), [], False),  # 8-bit keys and values: plain Triton
    ],
)
def test_what_it_launches(case: tuple[Any, ...], walks: list[int], by_copy: bool) -> None:
    launches = noted(*case)
    ours = [launch for launch in launches if launch[0] == "walk"]
    assert [consumers for _, consumers, _ in ours] == walks
    assert all(queries.startswith("tensordesc<") == by_copy for _, _, queries in ours)
    assert any(name == "_attend" for name, _, _ in launches) != bool(walks)
