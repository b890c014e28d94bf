"""What nvcc made of the CUDA decode, run on the CPU: values, bits, memory and the order of its copies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels.attention import AttentionSpec, allocate_pages
from engine.kernels.attention_call import AttentionCall
from engine.kernels.attention_plan import AttentionPlan
from engine.kernels.op import use_backend
from engine.kernels.rope import rope_table
from tests.kernels.cases import assert_near, randn
from tests.kernels.cuda.cases import tables_of
from tests.kernels.test_attention import int32, plan_of
from tests.kernels.triton.cases import needs_triton
from tests.row_invariance import assert_same_bits

pytest.importorskip("triton")
from tests.kernels.cuda.simulated import NVCC, cuda_attention, simulated

pytestmark = [
    needs_triton,
    pytest.mark.skipif(NVCC is None, reason="nvcc is not here"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernel itself"),
]
PAGES = 130
BF16, FP16, E4M3 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
NEW, CONTEXTS = [1, 3, 1], [1, 100, 650]  # a key; tiles of several pages, seen in part; two splits


class Pool:
    """Pages of one layer, full of random numbers. After a run `given` is what the decode got."""

    def __init__(self, spec: AttentionSpec, dtype: torch.dtype, contexts: list[int]) -> None:
        self.spec, self.dtype, self.contexts = spec, dtype, contexts
        order = torch.randperm(PAGES, generator=torch.Generator().manual_seed(0)).tolist()
        self.tables = tables_of(contexts, order)
        with use_backend("triton"):
            self.keys, self.values = allocate_pages(PAGES, 16, spec, dtype)
        for seed, pool in enumerate((self.keys, self.values)):
            pool.copy_(randn(*pool.shape, seed=seed).to(dtype).to(pool.dtype))

    def poison(self) -> None:
        """NaN wherever no sequence has a key."""
        used = torch.zeros(PAGES, 16, dtype=torch.bool)
        for table, context in zip(self.tables.tolist(), self.contexts, strict=True):
            for key in range(context):
                used[table[key // 16], key % 16] = True
        shape = (PAGES, self.spec.num_kv_heads, 16, self.spec.head_dim)
        for pool in (self.keys, self.values):
            bits = pool.view(torch.uint8).view(*shape, -1)
            bits.masked_fill_(~used[:, None, :, None, None], 0x7F if pool.dtype == E4M3 else 0xFF)

    def heads(self, pages: Tensor, sequence: int) -> Tensor:
        """Keys or values of a sequence, [H, context, Dh], float64."""
        shape = (PAGES, self.spec.num_kv_heads, 16, self.spec.head_dim)
        table = self.tables[sequence, : -(-self.contexts[sequence] // 16)].long()
        kept = pages.float().double().view(shape)[table].transpose(0, 1).flatten(1, 2)[:, : self.contexts[sequence]]
        return kept.repeat_interleave(self.spec.num_heads // self.spec.num_kv_heads, 0)

    def run(self, qkv: Tensor, plan: AttentionPlan, **options: object) -> Tensor:
        rope = rope_table(self.spec.head_dim, 1e4, None, 1024)
        with simulated(**options) as self.given, use_backend("triton"):
            out, _ = cuda_attention.forward(AttentionCall(qkv, self.spec, rope, plan, self.keys, self.values), False)
        return out

    def definition(self, new: list[int]) -> Tensor:
        """The output of the last run in float64."""
        outs, q = [], self.given[0]  # normed and turned, [T, H, Dh]
        for sequence, rows in enumerate(q.double().split(new)):
            keys, values = self.heads(self.keys, sequence), self.heads(self.values, sequence)
            own = torch.arange(self.contexts[sequence])[-len(rows) :, None]
            at = torch.arange(self.contexts[sequence])[None]
            seen = (at <= own) & (at > own - (self.spec.window or 1 << 30))
            scores = torch.einsum("qhd,hkd->hqk", rows, keys) * self.spec.scale
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            outs.append(torch.einsum("hqk,hkd->qhd", weights, values).flatten(1))
        return torch.cat(outs)


def rows_of(pool: Pool, count: int) -> Tensor:
    return randn(count, pool.spec.row_size, seed=7).to(pool.dtype)


@pytest.mark.parametrize(
    ("heads", "window", "dtype", "kv_dtype"),
    [
        ((8, 2, 64), None, BF16, None),
        ((6, 2, 96), 300, FP16, None),
        ((8, 2, 128), None, BF16, None),
        ((3, 3, 128), 50, BF16, E4M3),
        ((4, 1, 256), None, FP16, E4M3),
        ((4, 1, 256), None, BF16, None),
    ],
    ids=str,
)
def test_decode_is_that_of_the_definition_in_double(heads, window, dtype, kv_dtype):
    pool = Pool(AttentionSpec(*heads, window=window, kv_dtype=kv_dtype), dtype, CONTEXTS)
    out = pool.run(rows_of(pool, sum(NEW)), plan_of(NEW, CONTEXTS, pool.tables))
    assert_near(out, pool.definition(NEW), dtype, ulps=2)


@pytest.mark.parametrize("kv_dtype", [None, E4M3])
def test_its_copies_may_come_early_or_late_and_warps_in_any_order(kv_dtype):
    pool = Pool(AttentionSpec(8, 2, 64, kv_dtype=kv_dtype), BF16, CONTEXTS)
    plan, qkv = plan_of(NEW, CONTEXTS, pool.tables), rows_of(pool, sum(NEW))
    early = pool.run(qkv, plan)
    for options in ({"completion": "late"}, {"completion": "late", "schedule": "random", "seed": 1}):
        assert_same_bits(pool.run(qkv, plan, **options), early, str(options))


def test_a_row_has_the_same_bits_alone_and_in_a_batch():
    pool = Pool(AttentionSpec(8, 2, 64), BF16, CONTEXTS)
    qkv = rows_of(pool, sum(NEW))
    whole = pool.run(qkv, plan_of(NEW, CONTEXTS, pool.tables))
    for sequence, rows in enumerate(torch.arange(sum(NEW)).split(NEW)):
        plan = plan_of([len(rows)], [CONTEXTS[sequence]], pool.tables[sequence : sequence + 1].contiguous())
        assert_same_bits(pool.run(qkv[rows], plan), whole[rows], f"sequence {sequence}")


def test_siblings_that_share_pages_have_the_bits_of_each_alone():
    pool = Pool(AttentionSpec(8, 2, 64), BF16, [650, 640, 530])
    pool.tables[:, :32] = pool.tables[0, :32]  # one whole split
    qkv, plan = rows_of(pool, 3), plan_of([1, 1, 1], pool.contexts, pool.tables)
    together = pool.run(qkv, plan)
    items = pool.given[-2].decode.view(-1, 8)
    assert [0, 512, 12] in items[:, [3, 4, 1]].tolist(), "twelve rows against the first split"
    for row, context in enumerate(pool.contexts):
        alone = pool.run(qkv[row : row + 1], plan_of([1], [context], pool.tables[row : row + 1].contiguous()))
        assert_same_bits(together[row : row + 1], alone, f"sibling {row}")


@pytest.mark.parametrize("kv_dtype", [None, E4M3])
def test_what_unused_memory_holds_does_not_leak(kv_dtype):
    pool = Pool(AttentionSpec(8, 2, 128, window=200, kv_dtype=kv_dtype), BF16, CONTEXTS)
    plan, qkv = plan_of(NEW, CONTEXTS, pool.tables), rows_of(pool, sum(NEW))
    clean = pool.run(qkv, plan)
    pool.poison()
    assert_same_bits(pool.run(qkv, plan), clean, "pages full of NaN")


def test_rows_that_the_plan_has_and_the_call_has_not_are_left_alone():
    """The simulator lets no instruction touch what lies beside a tensor: a graph of two rows, a batch of three."""
    pool = Pool(AttentionSpec(8, 2, 64), BF16, [20, 600, 650])
    plan, qkv = plan_of([1, 1, 1], pool.contexts, pool.tables), rows_of(pool, 3)
    whole = pool.run(qkv, plan)
    plan.on_device(torch.device("cpu")).reserve(8, 8, 8 * 64)
    two = pool.run(qkv[:2], plan)
    assert_same_bits(two, whole[:2], "the rows that are there")
    plan.build(int32([0]), int32([]), int32([]), torch.zeros(0, 1, dtype=torch.int32), 16)
    pool.run(qkv, plan)  # no rows at all: lists of no items
