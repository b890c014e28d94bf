"""A sum on a GPU depends on how the compiler deals its elements to threads. Where two variants of a kernel must give
the same bits, they must be dealt alike; the compiler says so without a GPU, in a process that interprets no kernel."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import json, re, sys
import torch
from triton import compile as triton_compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from engine.kernels.op import use_backend
from engine.kernels.rms_norm import add_rms_norm, rms_norm
from engine.kernels.sample_token import sample_token
from engine.kernels.shard_logprob import shard_statistics
from engine.kernels.token_logprob import logits_logprob
from engine.kernels.triton.launch import collecting
from engine.kernels.weight import Weight

with use_backend("triton"), collecting() as launches:
    for width in (4096, 41):
        weight = Weight("w", (width,), torch.bfloat16, packed=False)
        x = torch.empty(8, width, dtype=torch.bfloat16)
        rms_norm(x, weight, 1e-5)
        add_rms_norm(x, None, weight, 1e-5)
        add_rms_norm(x, x, weight, 1e-5)
        rms_norm(x.clone().requires_grad_(), weight, 1e-5)
    for vocab in (131072, 50257):
        logits, knob, ids = torch.empty(8, vocab), torch.empty(8), torch.zeros(8, dtype=torch.int32)
        sample_token(logits, knob, ids, knob, knob, ids.long(), ids.long())
        logits_logprob(logits, ids)
        logits_logprob(logits, ids, knob)
        shard_statistics(logits, ids[:, None], knob)

found = {}
for noted in launches:
    if noted.name not in ("_forward", "_tile_statistics", "_fold") or "targets" in noted.signature:
        continue
    names = list(noted.signature)
    constants = {(names.index(name),): value for name, value in noted.constants.items()}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in noted.divisible}
    source = ASTSource(noted.kernel, noted.signature, constants, attributes)
    options = dict(num_warps=noted.num_warps, num_stages=noted.num_stages, enable_fp_fusion=False)
    code = triton_compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ttgir"]
    layouts = dict(re.findall(r"(#blocked\\d*) = (.*)", code))
    reduced = re.findall(r'"tt.reduce"[\\s\\S]*?\\}\\) : \\(tensor<(\\w+), (#\\w+)>', code)
    divided = "width" in noted.divisible or "vocab" in noted.divisible
    key = f"{noted.name} {noted.constants.get('BLOCK', noted.constants.get('FOLD'))} {divided}"
    found.setdefault(key, []).append([f"{kind} {layouts[layout]}" for kind, layout in reduced])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def layouts() -> dict[str, list[list[str]]]:
    """Of every kernel and shape, the layouts that each of its launches reduces in."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("kernel", ["_forward", "_tile_statistics", "_fold"])
def test_variants_that_must_agree_bitwise_reduce_in_one_layout(
    layouts: dict[str, list[list[str]]], kernel: str
) -> None:
    """RMSNorm with and without an addition, for sampling and for training; a row's statistics for the sampler, with a
    temperature, without one, and for shards."""
    shapes = [launches for key, launches in layouts.items() if key.split()[0] == kernel]
    assert len(shapes) == 2
    for launches in shapes:
        assert len(launches) == 4
        assert launches[0], "the kernel was compiled without a reduction"
        assert all(each == launches[0] for each in launches), launches
