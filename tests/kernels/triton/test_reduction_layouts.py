"""A sum on a GPU depends on how the compiler deals its elements to threads. Where two variants of a kernel must give
the same bits, they must be dealt alike; the compiler says so without a GPU, in a process that interprets no kernel."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[3]
COMPILE = """
import json, re, sys
import torch
from tests.kernels.triton.stages import compiled_to, products, reductions

def named(found):
    return [f"{kind} {layout}" for kind, layout in found]
"""
SCRIPT = (
    COMPILE
    + """
from engine.kernels.op import use_backend
from engine.kernels.rms_norm import add_rms_norm, rms_norm
from engine.kernels.sample_token import sample_token
from engine.kernels.shard_logprob import shard_statistics
from engine.kernels.token_logprob import logits_logprob
from engine.kernels.triton.launch import collecting
from engine.kernels.weight import Weight

def elsewhere(x):  # where no address is a multiple of 16
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)

with use_backend("triton"), collecting() as launches:
    for width in (4096, 41):
        weight = Weight("w", (width,), torch.bfloat16, packed=False)
        x = torch.empty(8, width, dtype=torch.bfloat16)
        rms_norm(x, weight, 1e-5)
        add_rms_norm(x, None, weight, 1e-5)
        add_rms_norm(x, x, weight, 1e-5)
        rms_norm(x.clone().requires_grad_(), weight, 1e-5)
        rms_norm(elsewhere(x), weight, 1e-5)
    for vocab in (131072, 50257):
        logits, knob, ids = torch.empty(8, vocab), torch.empty(8), torch.zeros(8, dtype=torch.int32)
        sample_token(logits, knob, ids, knob, knob, ids.long(), ids.long())
        logits_logprob(elsewhere(logits), ids)
        logits_logprob(logits, ids)
        logits_logprob(logits, ids, knob)
        shard_statistics(logits, ids[:, None], knob)

found = {}
for noted in launches:
    if noted.name not in ("_forward", "_tile_statistics", "_fold") or "targets" in noted.signature:
        continue
    reduced = named(reductions(compiled_to("ttgir", noted)))
    divided = "width" in noted.divisible or "vocab" in noted.divisible
    key = f"{noted.name} {noted.constants.get('BLOCK', noted.constants.get('FOLD'))} {divided}"
    found.setdefault(key, []).append(reduced)
print(json.dumps(found))
"""
)
MATRIX_SCRIPT = (
    COMPILE
    + """
from engine.kernels.attention import AttentionPlan, AttentionSpec, allocate_pages, attention
from engine.kernels.linear import linear
from engine.kernels.op import use_backend
from engine.kernels.triton.launch import collecting
from engine.kernels.weight import Weight

found = {}
for dim, window, kv_dtype in ((64, None, None), (128, None, None), (128, 700, None), (128, None, torch.float8_e4m3fn)):
    spec = AttentionSpec(8, 2, dim, window=window, kv_dtype=kv_dtype)
    norm = Weight("norm", (dim,), torch.bfloat16, packed=False)
    rope, keys, values = torch.empty(4096, dim), *allocate_pages(64, 16, spec, torch.bfloat16)
    qkv = torch.empty(512, spec.row_size, dtype=torch.bfloat16)
    with use_backend("triton"), collecting() as launches:
        attention(qkv, spec, rope, AttentionPlan.of_sequences([512]), q_norm=norm, k_norm=norm)
        attention(qkv.clone().requires_grad_(), spec, rope, AttentionPlan.of_sequences([512]), q_norm=norm, k_norm=norm)
        for new, context in ((512, 512), (1, 1024)):
            plan, starts = AttentionPlan(), torch.tensor([0, new], dtype=torch.int32)
            positions = torch.arange(context - new, context, dtype=torch.int32)
            table = torch.zeros(1, context // 16, dtype=torch.int32)
            plan.build(starts, torch.tensor([context], dtype=torch.int32), positions, table, 16)
            attention(qkv[:new], spec, rope, plan, keys, values, norm, norm)
    for noted in launches:
        if noted.name == "_fold_parts":
            continue
        code = compiled_to("ttgir", noted)
        dealt = [named(reductions(code)), named(products(code))]
        found.setdefault(f"{noted.name} {dim} {window} {kv_dtype}", []).append(dealt)
with use_backend("triton"), collecting() as launches:
    weight = Weight("matrix", (4096, 4096), torch.bfloat16, packed=True)
    for rows in (4096, 1536, 512, 32, 1):
        linear(torch.empty(rows, 4096, dtype=torch.bfloat16), weight)
        linear(torch.empty(rows, 4096, dtype=torch.bfloat16), weight, out_dtype=torch.float32)
for noted in launches:
    dots = named(products(compiled_to("ttgir", noted)))
    instructions = re.findall(r"wgmma.mma_async.sync.aligned.m64n(\\d+)k(\\d+)", compiled_to("ptx", noted))
    found.setdefault("_multiply", []).append([dots, instructions])
print(json.dumps(found))
"""
)


@pytest.fixture(scope="module")
def layouts() -> dict[str, list[list[str]]]:
    """Of every kernel and shape, the layouts that each of its launches reduces in."""
    return _result_of(SCRIPT)


@pytest.fixture(scope="module")
def matrix_layouts() -> dict[str, list[Any]]:
    """Of attention's and linear's launches, the layouts of sums and of products."""
    return _result_of(MATRIX_SCRIPT)


def _result_of(script: str) -> Any:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("kernel", ["_forward", "_tile_statistics", "_fold"])
def test_variants_that_must_agree_bitwise_reduce_in_one_layout(
    layouts: dict[str, list[list[str]]], kernel: str
) -> None:
    """RMSNorm with and without an addition, for sampling and for training; a row's statistics for the sampler, with a
    temperature, without one, and for shards; either of tensors that begin anywhere."""
    shapes = [launches for key, launches in layouts.items() if key.split()[0] == kernel]
    assert len(shapes) == 2
    for launches in shapes:
        assert len(launches) == 5
        assert launches[0], "the kernel was compiled without a reduction"
        assert all(each == launches[0] for each in launches), launches


def _within_a_row(layout: str) -> tuple[str, str]:
    """Of a matrix layout, what says how the elements of one row are dealt: the instruction, and that no second warp has
    any of them. How many rows of how many warps are side by side does not enter."""
    warps = re.search(r"warpsPerCTA = \[\d+, (\d+)\]", layout)
    instruction = re.search(r"versionMajor = 3.*instrShape = \[16, (\d+), 16\]", layout)
    assert warps and instruction, f"not wgmma: {layout}"
    return warps[1], instruction[1]


@pytest.mark.parametrize("shape", ["64 None None", "128 None None", "128 700 None", "128 None torch.float8_e4m3fn"])
def test_attention_of_many_rows_and_of_few_uses_one_layout_in_a_row(
    matrix_layouts: dict[str, list[Any]], shape: str
) -> None:
    """Training with lse, scoring without, prefill and decode from pages: tiles of 128 rows and of 64."""
    launches = matrix_layouts[f"_attend {shape}"]
    assert len(launches) == 4
    dealt = [[[_within_a_row(layout) for layout in kind] for kind in launch] for launch in launches]
    assert [len(kind) for kind in dealt[0]] == [2, 2], "maximum and sum; the products with keys and with values"
    assert all(each == dealt[0] for each in dealt), dealt
    assert all(warps == "1" for kind in dealt[0] for warps, _ in kind)


@pytest.mark.parametrize("kernel", ["_write_queries", "_write_keys"])
@pytest.mark.parametrize("shape", ["64 None None", "128 None None", "128 None torch.float8_e4m3fn"])
def test_query_and_key_norms_sum_in_one_layout_with_pages_and_without(
    matrix_layouts: dict[str, list[Any]], kernel: str, shape: str
) -> None:
    launches = matrix_layouts[f"{kernel} {shape}"]
    assert len(launches) == 4 and len(launches[0][0]) == 2
    assert all(each == launches[0] for each in launches), launches


def test_every_width_of_the_matmul_adds_the_same_terms_with_each_instruction(
    matrix_layouts: dict[str, list[Any]],
) -> None:
    """One product per tile of K, onto the sum of those before: four instructions of 16 terms, whatever the columns."""
    widths = set()
    for dots, instructions in matrix_layouts["_multiply"]:
        assert len(dots) == 1 and _within_a_row(dots[0])[0] == "1"
        assert [depth for _, depth in instructions] == ["16"] * 4
        widths.add(instructions[0][0])
    assert widths == {"256", "128", "64", "32"}
