"""Training, prefill and decode run variants of attention's kernels. They give the same bits only if the compiler deals
rows and their sums to threads alike in all of them; it says so without a GPU, in a process that interprets none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import json, re
from itertools import product
import torch
from engine.kernels.attention import AttentionPlan, AttentionSpec, allocate_pages, attention
from engine.kernels.op import use_backend
from engine.kernels.triton.launch import collecting
from engine.kernels.weight import Weight
from tests.kernels.triton.stages import compiled_to, products, reductions

def int32(*values):
    return torch.tensor(values, dtype=torch.int32)

found = {}
for head_dim, (kv_dtype, page_size) in product((64, 96, 256), ((None, 16), (torch.float8_e4m3fn, 128))):
    norm = Weight("norm", (head_dim,), torch.bfloat16, packed=False)
    rope = torch.empty(8192, head_dim)
    with use_backend("triton"), collecting() as launches, torch.no_grad():
        spec = AttentionSpec(32, 8, head_dim, kv_dtype=kv_dtype)
        qkv = torch.empty(500, spec.row_size, dtype=torch.bfloat16)
        attention(qkv, spec, rope, AttentionPlan.of_sequences([500]), None, None, norm, norm)
        pages = allocate_pages(1, page_size, spec, torch.bfloat16)
        for rows in (500, 1):
            plan = AttentionPlan()
            tables = torch.zeros(1, 4096 // page_size, dtype=torch.int32)
            positions = torch.arange(4096 - rows, 4096, dtype=torch.int32)
            plan.build(int32(0, rows), int32(4096), positions, tables, page_size)
            attention(qkv[:rows], spec, rope, plan, *pages, norm, norm)
    done = set()
    for noted in launches:
        if noted.name in ("_fold_parts", "_to_pages") or repr(noted) in done:
            continue
        done.add(repr(noted))
        code = compiled_to("ttgir", noted)
        dealt = []
        for _, text in reductions(code):
            rows = noted.constants.get("BLOCK_M", 0)
            if rows:  # how many warps are below one another may differ, as long as each has 16 rows of its own
                text = text.replace(f"warpsPerCTA = [{rows // 16}, ", "warpsPerCTA = [rows / 16, ")
            dealt.append(text)
        shapes = sorted(re.findall(r"instrShape = \\[[^\\]]*\\]", code))
        key = f"{noted.name} {head_dim} {kv_dtype}"
        found.setdefault(key, []).append([dealt, shapes, len(products(code))])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def variants() -> dict[str, list[tuple[list[str], list[str], int]]]:
    """Of every kernel and head_dim, what each variant reduces in and multiplies with."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("head_dim", [64, 96, 256])
@pytest.mark.parametrize("kernel", ["_write_queries", "_write_keys", "_attend"])
def test_variants_that_must_agree_bitwise_reduce_in_one_layout(variants, kernel, head_dim, kv_dtype):
    """Of one model: with pages and without, of many rows and of few."""
    dealt = [layouts for layouts, _, _ in variants[f"{kernel} {head_dim} {kv_dtype}"]]
    assert len(dealt) >= {"_write_queries": 1, "_write_keys": 1 if kv_dtype else 2, "_attend": 3}[kernel]
    assert dealt[0], "the kernel was compiled without a reduction"
    assert all(each == dealt[0] for each in dealt), dealt


@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("head_dim", [64, 96, 256])
def test_tiles_of_many_and_of_few_rows_multiply_with_one_instruction(variants, head_dim, kv_dtype):
    products = [(instructions, wgmma) for _, instructions, wgmma in variants[f"_attend {head_dim} {kv_dtype}"]]
    assert all(each == products[0] for each in products), products
    assert products[0][1] == 2, "with keys and with values, by wgmma"
