"""What the tests of the CUDA decode share with the run under compute-sanitizer."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from engine.kernels.attention import AttentionSpec, allocate_pages, attention
from engine.kernels.op import use_backend
from engine.kernels.rope import rope_table
from tests.kernels.cases import randn
from tests.kernels.test_attention import plan_of

PAGES = 700


def tables_of(contexts: list[int], pages: list[int]) -> Tensor:
    """Pages of 16 keys for each sequence, taken off the list one after the other."""
    sizes = [-(-context // 16) for context in contexts]
    tables = torch.zeros(len(sizes), max(sizes), dtype=torch.int32)
    for row, (begin, size) in enumerate(zip(itertools.accumulate(sizes, initial=0), sizes, strict=False)):
        tables[row, :size] = torch.tensor(pages[begin : begin + size])
    return tables


def decoded(backend: str, spec: AttentionSpec, dtype: torch.dtype) -> Tensor:
    """Four sequences, one of three new tokens and one of 18 splits, on a GPU."""
    contexts = [1, 100, 513, 9000]
    generator = torch.Generator().manual_seed(0)
    plan = plan_of([1, 1, 3, 1], contexts, tables_of(contexts, torch.randperm(PAGES, generator=generator).tolist()))
    rope = rope_table(spec.head_dim, 1e4, None, max(contexts)).cuda()
    qkv = randn(6, spec.row_size).to("cuda", dtype)
    with use_backend(backend):
        with torch.device("cuda"):
            keys, values = allocate_pages(PAGES, 16, spec, dtype)
        for pool, seed in ((keys, 1), (values, 2)):
            pool.copy_(randn(*pool.shape, seed=seed).to("cuda", dtype).to(pool.dtype))
        return attention(qkv, spec, rope, plan, keys, values)
