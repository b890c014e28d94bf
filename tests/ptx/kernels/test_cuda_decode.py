"""The CUDA C++ decode, as nvcc compiles it for Hopper, beside Triton's: every bit, but for what happens inside a matrix
instruction (mma.sync here, wgmma there)."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels.attention import AttentionSpec, allocate_pages
from engine.kernels.cuda import attention as cuda_attention
from engine.kernels.op import use_backend
from engine.kernels.rope import rope_table
from tests.kernels.cases import randn
from tests.kernels.cuda.cases import tables_of
from tests.kernels.test_attention import plan_of
from tests.ptx.launches import simulated
from tests.ptx.machine import Machine
from tests.ptx.parse import Module, parse
from tests.row_invariance import assert_same_bits

SOURCE = Path(__file__).resolve().parents[3] / "engine" / "csrc" / "cuda" / "attention.cu"
NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
THREADS, PAGES = 128, 120
DECODE = cuda_attention.decode
CONTEXTS = [1, 100, 513, 700]  # the third has three new tokens; the last two have two splits of 512 keys


def kernel_of(text: str, name: str, q: Tensor, keys: Tensor, dim: int) -> Module:
    """The instance of the template for these tensors."""
    kind = {torch.bfloat16: "13__nv_bfloat16", torch.float16: "6__half"}[q.dtype]
    page = ("h" if keys.dtype == torch.float8_e4m3fn else r"S\w*_") if name == "decode" else ""
    return parse(text, rf"\d{name}I{kind}{page}Li{dim}E")


def shared_bytes(dim: int, page: int) -> int:
    """Shape::kBytes of attention.cu."""
    keys = 128 if dim <= 64 else 64
    widened = keys * (dim + 8) * 2 if page == 1 else 0
    return 2 * 2 * keys * (dim + 16 // page) * page + 2 * widened + 16 * (keys + 8) * 4


def simulated_decode(text: str, completion: str, *arguments: Any) -> None:
    """`engine.kernels.cuda.attention.decode`, whose launches run in the simulator."""
    q, keys, values, out, sums, softmaxes, spec, plan, lists, _ = arguments
    tensors = [q, keys, values, out, sums, softmaxes, lists.decode, lists.counts, lists.turns, lists.parts,
               plan.tables, plan.last_keys]  # fmt: skip

    def launch(*given: Any) -> None:
        *pointers, types, shape, factor, tree_sums, has_turns, _ = given
        data = struct.pack("<12Q2i9qf??2x", *pointers, *types, *shape, factor, tree_sums, has_turns)
        for name, shared in (("decode", shared_bytes(spec.head_dim, keys.element_size())), ("fold", 0)):
            if name == "decode" or has_turns:
                module = kernel_of(text, name, q, keys, spec.head_dim)
                (kernel,) = module.kernels
                schedule = "random" if completion == "late" else "in order"
                Machine(module, kernel, THREADS, shared, schedule, completion).run((3,), [data], tensors)

    extension = SimpleNamespace(BFLOAT16=1, FLOAT16=2, E4M3=3, attention_decode=launch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_attention, "cuda_extension", lambda: extension)
        DECODE(*arguments)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What nvcc makes of the kernels."""
    to = tmp_path_factory.mktemp("ptx") / "attention.ptx"
    subprocess.run([str(NVCC), "-std=c++17", "-O3", "-fmad=false", "-ptx", "-arch=sm_90a", str(SOURCE), "-o", str(to)],
                   check=True, capture_output=True)  # fmt: skip
    return to.read_text()


CASES = [
    (128, torch.bfloat16, None, None, "early"),
    (64, torch.bfloat16, 300, torch.float8_e4m3fn, "late"),
]


@pytest.mark.parametrize(("dim", "dtype", "window", "kv_dtype", "completion"), CASES)
def test_decode_has_the_bits_of_triton(compiled, dim, dtype, window, kv_dtype, completion):
    spec = AttentionSpec(4, 1, dim, window=window, kv_dtype=kv_dtype)
    generator = torch.Generator().manual_seed(0)
    rope, qkv = rope_table(dim, 1e4, None, max(CONTEXTS)), randn(6, spec.row_size).to(dtype)
    tables = tables_of(CONTEXTS, torch.randperm(PAGES, generator=generator).tolist())
    outs = []
    for backend in ("triton", "cuda"):
        plan = plan_of([1, 1, 3, 1], CONTEXTS, tables)
        with use_backend("triton"):
            keys, values = allocate_pages(PAGES, 16, spec, dtype)
        for pool, seed in ((keys, 1), (values, 2)):
            pool.copy_(randn(*pool.shape, seed=seed).to(dtype).to(pool.dtype))
        with simulated(), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_attention, "decode", lambda *given: simulated_decode(compiled, completion, *given))
            forward = cuda_attention.forward if backend == "cuda" else cuda_attention.triton_attention.forward
            out, _ = forward(qkv, None, spec, rope, plan, keys, values, None, None, False)
        outs.append(out)
    assert outs[0].isfinite().all() and outs[0].abs().amax(1).min() > 0
    assert_same_bits(outs[1], outs[0], "CUDA C++ against Triton")
