"""Attention's Triton kernels: values against the definition in float64, and one set of bits in every mode.

Tiles are small here, so that 40 keys are several splits; what they prove holds for any size of tile, except which
instruction multiplies: that takes a GPU, and the tiles of production.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.errors import InputError
from engine.kernels.attention import AttentionPlan, AttentionSpec, allocate_pages, attention
from engine.kernels.attention_call import AttentionCall
from engine.kernels.op import use_backend
from engine.kernels.rope import apply_rope, rope_table
from tests.kernels.cases import assert_near, randn
from tests.kernels.test_attention import definition, int32, plan_of
from tests.kernels.triton.cases import DEVICE, DTYPES, INTERPRETED, needs_triton, norms_of
from tests.row_invariance import assert_same_bits

pytestmark = needs_triton


def tiles_for_tests():
    from engine.kernels.triton.attention_work import Tiles

    # A GPU sums rows of 16 in another order than rows of 32; production has tiles of 64 rows at least, or of one size.
    block_m, decode_m = (32, 16) if INTERPRETED else (64, 64)
    return Tiles(block_m, decode_m, block_n=16, split=16, warps=4, programs=2, decode_programs=2, stages=1)


def rope_of(spec: AttentionSpec) -> Tensor:
    return rope_table(spec.head_dim, 10000.0, None, 96).to(DEVICE)


def forward(
    qkv, spec, plan, keys=None, values=None, norms=(None, None), kv=None, tiles=None, rope=None, want_lse=False,
    walk=None,
):  # fmt: skip
    """The kernels with tiles, and a walk, of a test's choice."""
    from engine.kernels.triton import attention as kernels

    tiles, rope = tiles or tiles_for_tests(), rope_of(spec) if rope is None else rope
    with use_backend("triton"), torch.no_grad():
        call = AttentionCall(qkv, spec, rope, plan, keys, values, *norms, kv)
        out, lse = kernels.forward(call, want_lse, tiles=tiles, walk=walk)
    return (out, lse) if want_lse else out


class Cache:
    """Sequences in shuffled pages, poisoned with NaN, fed in pieces."""

    def __init__(self, spec: AttentionSpec, dtype: torch.dtype, lengths: list[int], page_size: int = 16) -> None:
        self.spec, self.lengths, self.page_size = spec, lengths, page_size
        width = -(-max(lengths) // page_size)
        self.tables = torch.randperm(len(lengths) * width, dtype=torch.int32).view(len(lengths), width)
        with use_backend("triton"), torch.device(DEVICE):
            self.keys, self.values = allocate_pages(self.tables.numel(), page_size, spec, dtype)
        for pool in (self.keys, self.values):
            if pool.dtype == torch.float8_e4m3fn:
                pool.view(torch.uint8).fill_(0x7F)
            else:
                pool.fill_(float("nan"))

    def run(self, qkv: Tensor, pieces: list[list[int]], **options) -> Tensor:
        """Feeds sequence s its rows pieces[s][0], pieces[s][1], ... at a time, all sequences in step."""
        parts, done = qkv.split(self.lengths), [0] * len(self.lengths)
        outs: list[list[Tensor]] = [[] for _ in self.lengths]
        for turn in range(max(map(len, pieces))):
            which = [s for s, p in enumerate(pieces) if turn < len(p)]
            counts = [pieces[s][turn] for s in which]
            rows = [parts[s][done[s] : done[s] + n] for s, n in zip(which, counts, strict=True)]
            for s, n in zip(which, counts, strict=True):
                done[s] += n
            plan = plan_of(counts, [done[s] for s in which], self.tables[which].contiguous(), self.page_size)
            out = forward(torch.cat(rows), self.spec, plan, self.keys, self.values, **options)
            for s, part in zip(which, out.split(counts), strict=True):
                outs[s].append(part)
        return torch.cat([torch.cat(o) for o in outs])


LENGTHS = [1, 19, 37]
# (H, K, Dh, window): 1, 2, 3 and 4 query heads a key head; widths that are powers of two and that are not.
SHAPES = [(2, 2, 16, None), (3, 1, 48, 20), (4, 2, 96, None), (4, 1, 32, 9)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_that_of_the_definition_in_double(shape, dtype):
    spec = AttentionSpec(*shape)
    qkv, norms = randn(sum(LENGTHS), spec.row_size).to(DEVICE, dtype), norms_of(spec, dtype)
    for used in (norms, (None, None)):
        weights = (None if w is None else w.data.cpu().double() for w in used)
        exact = definition(qkv.cpu().double(), spec, rope_of(spec).cpu(), LENGTHS, *weights)
        out = forward(qkv, spec, plan_of(LENGTHS), norms=used)
        assert_near(out, exact, dtype, ulps=8.0 if dtype == torch.float32 else 2.0)


def test_lse_is_the_binary_logarithm_of_the_sum_of_exponentials():
    spec = AttentionSpec(2, 1, 16, scale=0.7)
    qkv = randn(21, spec.row_size).to(DEVICE)
    _, lse = forward(qkv, spec, plan_of([21]), want_lse=True)
    flat = rope_table(16, 1e4, None, 96).double()
    q, k, _ = (apply_rope(x, flat, torch.arange(21)) for x in qkv.cpu().double().view(21, 4, 16).split([2, 1, 1], 1))
    scores = torch.einsum("qhd,kd->qhk", q, k[:, 0]) * spec.scale
    hidden = torch.arange(21)[None] > torch.arange(21)[:, None]
    exact = scores.masked_fill(hidden[:, None], float("-inf")).logsumexp(-1) / torch.log(torch.tensor(2.0).double())
    assert_near(lse.cpu(), exact, torch.float32, ulps=8.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 2, 32, None), (3, 1, 48, 20)])
def test_training_prefill_chunks_and_decode_have_the_same_bits(shape, dtype):
    spec = AttentionSpec(*shape)
    qkv, norms = randn(sum(LENGTHS), spec.row_size).to(DEVICE, dtype), norms_of(spec, dtype)
    trained = forward(qkv, spec, plan_of(LENGTHS), norms=norms)
    assert trained.isfinite().all()
    for mode, page_size, pieces in (
        ("prefill", 48, [[1], [19], [37]]),
        ("chunks", 16, [[1], [5, 14], [20, 17]]),
        ("decode", 16, [[1], [17, 1, 1], [34, 1, 1, 1]]),
    ):
        out = Cache(spec, dtype, LENGTHS, page_size).run(qkv, pieces, norms=norms)
        assert_same_bits(out, trained, f"{mode}, pages of {page_size}")


def test_a_tile_of_keys_may_lie_in_several_pages_whose_numbers_take_17_bits():
    """Page numbers are read in halves of 16 bits."""
    spec, first = AttentionSpec(2, 1, 16), 1 << 16
    options = {"tiles": replace(tiles_for_tests(), block_n=32, split=32)}
    qkv = randn(sum(LENGTHS), spec.row_size).to(DEVICE)
    trained = forward(qkv, spec, plan_of(LENGTHS), **options)
    cache = Cache(spec, torch.float32, LENGTHS)
    with use_backend("triton"), torch.device(DEVICE):
        cache.keys, cache.values = allocate_pages(first + cache.tables.numel(), 16, spec, torch.float32)
    cache.tables += first
    assert_same_bits(cache.run(qkv, [[1], [18, 1], [34, 1, 1, 1]], **options), trained, "pages from 65,536 on")


def test_with_e4m3_pages_training_and_decode_have_the_same_bits():
    spec = AttentionSpec(2, 1, 16, kv_dtype=torch.float8_e4m3fn)
    qkv = randn(20, spec.row_size).to(DEVICE)
    trained = forward(qkv, spec, plan_of([20]))
    assert trained.isfinite().all()
    assert_same_bits(Cache(spec, torch.float32, [20]).run(qkv, [[18, 1, 1]]), trained, "decode")


def test_a_split_of_another_size_has_other_bits():
    """So the test above would see a decode that splits keys elsewhere than the walk does."""
    spec = AttentionSpec(2, 1, 16)
    qkv = randn(60, spec.row_size).to(DEVICE)
    small = forward(qkv, spec, plan_of([60]))
    assert not torch.equal(small, forward(qkv, spec, plan_of([60]), tiles=replace(tiles_for_tests(), split=32)))


def test_how_work_is_dealt_changes_no_bit():
    """Splits that are folded in registers or through memory, or some each way, once they end or before the next begins;
    tiles of more rows or fewer. 64 keys end with a split, 60 within one."""
    spec = AttentionSpec(4, 2, 16, window=50)
    qkv = randn(64, spec.row_size).to(DEVICE)
    pieces, tiles = [[51, 8, 1, 4]], tiles_for_tests()
    base = Cache(spec, torch.float32, [64]).run(qkv, pieces, tiles=replace(tiles, partials=0))
    for name, other in {
        "folded after, in registers": replace(tiles, partials=0, fold_after=True, reload=True),
        "folded after, some in memory": replace(tiles, partials=33, programs=100, fold_after=True),
        "rooms for some": replace(tiles, partials=33, programs=100, reload=True),
        "room for all": replace(tiles, programs=100),
        **({"tiles of 16 rows": replace(tiles, block_m=16)} if INTERPRETED else {}),
    }.items():
        assert_same_bits(Cache(spec, torch.float32, [64]).run(qkv, pieces, tiles=other), base, name)


def test_splits_of_few_rows_are_dealt_side_by_side_while_there_is_room():
    plan = plan_of([1, 1, 1], [90, 20, 3], torch.arange(18, dtype=torch.int32).view(3, 6), 16)
    lists = plan.on_device(torch.device(DEVICE)).lists(2, 2, 0, replace(tiles_for_tests(), partials=7))
    # 6, 2 and 1 splits, and room for 7: the second sequence folds its own in registers, the third has nothing to fold
    assert (lists.num_walk, lists.num_decode, lists.num_turns, lists.num_partials) == (1, 6 + 1, 1, 6)
    walk, decode = lists.walk[:8].cpu(), lists.decode[: 8 * 7].view(7, 8).cpu()
    assert (walk[3:5].tolist(), walk[7].item()) == ([0, 20], -1)
    assert decode[:, 3:5].tolist() == [*[[b, b + 16] for b in range(0, 80, 16)], [80, 90], [0, 3]]
    assert decode[:, 7].tolist() == [0, 1, 2, 3, 4, 5, -1]


def test_sequences_that_share_pages_are_read_together_with_the_bits_of_each_alone():
    spec = AttentionSpec(4, 2, 16)
    tiles, shared = replace(tiles_for_tests(), decode_programs=3), 48
    lengths = [50, 49, 70, 60, 51, 33, 40]  # five with three splits in common, two with two; tiles hold 8 tokens
    prompt = randn(shared, spec.row_size).to(DEVICE)
    parts = [torch.cat([prompt[:n], randn(n, spec.row_size, seed=n).to(DEVICE)[shared:]]) for n in lengths]
    cache = Cache(spec, torch.float32, lengths)
    cache.tables[:, : shared // 16] = cache.tables[0, : shared // 16]
    alone = []
    for s, part in enumerate(parts):
        table = cache.tables[s : s + 1].contiguous()
        forward(part[:-1].contiguous(), spec, plan_of([len(part) - 1], None, table), cache.keys, cache.values)
        alone.append(forward(part, spec, plan_of([len(part)]))[-1:])
    order = [0, 1, 2, 3, 4, 5, 6, 2]
    plan = plan_of([1] * 8, [lengths[s] for s in order], cache.tables[order].contiguous())
    out = forward(torch.cat([parts[s][-1:] for s in order]), spec, plan, cache.keys, cache.values, tiles=tiles)
    assert_same_bits(out, torch.cat([alone[s] for s in order]), "rows that share pages")
    items = plan.on_device(out.device).lists(2, 2, 0, tiles).decode.view(-1, 8)
    assert [0, 16, 16] in items[:, [3, 4, 1]].tolist(), "eight tokens of two heads each against the first split"


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_what_shares_the_batch(dtype):
    spec = AttentionSpec(3, 1, 32, window=25)
    qkv = randn(sum(LENGTHS), spec.row_size).to(DEVICE, dtype)
    whole = forward(qkv, spec, plan_of(LENGTHS)).split(LENGTHS)
    parts = qkv.split(LENGTHS)
    for order in ([2], [1, 2, 0, 2]):
        out = forward(torch.cat([parts[s] for s in order]), spec, plan_of([LENGTHS[s] for s in order]))
        assert_same_bits(out, torch.cat([whole[s] for s in order]), f"sequences {order}")


def test_rows_of_a_context_parallel_rank_have_the_bits_that_they_have_among_all_rows():
    spec = AttentionSpec(4, 2, 16, window=30)
    qkv, norms = randn(sum(LENGTHS), spec.row_size).to(DEVICE), norms_of(spec, torch.float32)
    kv_plan, queries = plan_of(LENGTHS), spec.num_heads * spec.head_dim
    whole = forward(qkv, spec, kv_plan, norms=norms)
    for segments in ([(0, 1), (3, 11), (40, 57)], [(25, 30)], []):
        plan = AttentionPlan(kv_plan)
        plan.build_segments(int32([b for b, _ in segments]), int32([e for _, e in segments]))
        rows = plan.rows()
        out = forward(qkv[rows, :queries].contiguous(), spec, plan, norms=norms, kv=qkv[:, queries:])
        assert_same_bits(out, whole[rows], f"segments {segments}")


def test_e4m3_agrees_with_the_definition_which_rounds_keys_and_values():
    spec = AttentionSpec(4, 2, 32, kv_dtype=torch.float8_e4m3fn)
    qkv = randn(40, spec.row_size).to(DEVICE)
    qkv[3, -2 * 32 :] *= 600  # values that saturate
    outs = {}
    for backend in ("triton", "torch"):
        with use_backend(backend):
            plain = attention(qkv, spec, rope_of(spec), plan_of([40]))
            with torch.device(DEVICE):
                keys, values = allocate_pages(3, 16, spec, torch.float32)
            tables = int32([2, 0, 1]).view(1, 3)
            paged = attention(qkv, spec, rope_of(spec), plan_of([40], [40], tables, 16), keys, values)
            outs[backend] = plain, keys.view(torch.uint8), values.view(torch.uint8)
        assert keys.dtype == torch.float8_e4m3fn
        torch.testing.assert_close(paged, plain, rtol=0, atol=0)
    torch.testing.assert_close(outs["triton"][0], outs["torch"][0], rtol=1e-5, atol=1e-5)
    assert torch.equal(outs["triton"][1], outs["torch"][1])
    assert torch.equal(outs["triton"][2], outs["torch"][2])
    exact = replace(spec, kv_dtype=None)
    with use_backend("torch"):
        assert not torch.allclose(attention(qkv, exact, rope_of(spec), plan_of([40])), outs["torch"][0], atol=1e-3)


def test_e4m3_rounds_to_nearest_even_and_saturates():
    """Every value of e4m3, every middle between two of them, what lies beside these, and what is out of range."""
    from tests.kernels.triton.e4m3 import rounded

    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = grid[grid.isfinite()].sort().values
    middles = (grid[1:] + grid[:-1]) / 2
    inf = torch.tensor(float("inf"))
    x = torch.cat([grid, middles, middles.nextafter(inf), middles.nextafter(-inf), torch.tensor([500.0, -1e9, 1e-30])])
    assert torch.equal(rounded(x), x.clamp(-448, 448).to(torch.float8_e4m3fn).float())
    assert rounded(torch.tensor([float("nan")])).isnan()


def test_no_rows_give_no_rows():
    spec = AttentionSpec(2, 1, 16)
    assert forward(torch.empty(0, spec.row_size, device=DEVICE), spec, plan_of([])).shape == (0, 32)


def test_a_reserved_plan_keeps_its_addresses_and_refuses_what_does_not_fit():
    spec = AttentionSpec(4, 2, 16)
    qkv = randn(40, spec.row_size).to(DEVICE)
    tables = torch.arange(5, dtype=torch.int32).view(1, 5)
    plan = plan_of([30], [30], tables)
    on_device = plan.on_device(torch.device(DEVICE))
    on_device.reserve(num_tokens=40, num_sequences=2, num_table_pages=5)
    cache = Cache(spec, torch.float32, [80])
    forward(qkv, spec, plan, cache.keys, cache.values)
    lists = on_device.lists(2, 2, 0, tiles_for_tests())

    def addresses() -> list[int]:
        owned = (on_device.counts, on_device.last_keys, on_device.slots, on_device.tables, on_device.query_positions)
        return [t.data_ptr() for t in (*owned, lists.counts, lists.walk, lists.decode, lists.turns, lists.parts)]

    before = addresses()
    plan.build(int32([0, 1]), int32([31]), int32([30]), tables, 16)
    out = forward(qkv, spec, plan, cache.keys, cache.values)  # rows past the plan's are left alone
    assert addresses() == before
    alone = forward(qkv[:1], spec, plan_of([1], [31], tables), cache.keys, cache.values)
    assert_same_bits(out[:1], alone, "a batch of one row in room for 40")
    plan.build(int32([0, 20, 30]), int32([20, 31]), int32([*range(20), *range(21, 31)]), tables.repeat(2, 1), 16)
    few = forward(qkv[:3], spec, plan, cache.keys, cache.values)  # three rows of room for a batch of 30
    assert few.shape == (3, 64)
    assert_same_bits(few, forward(qkv[:30], spec, plan, cache.keys, cache.values)[:3], "rows that there is room for")
    plan.build(int32([0, 80]), int32([80]), torch.arange(80, dtype=torch.int32), tables, 16)
    with pytest.raises(InputError, match="reserve the plan"):
        forward(randn(80, spec.row_size).to(DEVICE), spec, plan, cache.keys, cache.values)


def test_bad_input_is_refused_by_name():
    spec = AttentionSpec(2, 1, 16)
    qkv = randn(10, spec.row_size).to(DEVICE)
    with pytest.raises(InputError, match="qkv has 10 rows and the plan 9"):
        forward(qkv, spec, plan_of([9]))
    with pytest.raises(InputError, match="a position is 99 and the RoPE table ends at 95"):
        forward(randn(100, spec.row_size).to(DEVICE), spec, plan_of([100]))
    cache = Cache(spec, torch.float32, [16])
    with pytest.raises(InputError, match="names page 7 of 1"):
        forward(qkv, spec, plan_of([10], [10], int32([7]).view(1, 1)), cache.keys, cache.values)
    with pytest.raises(InputError, match=r"kv_dtype is torch\.int8"):
        AttentionSpec(2, 1, 16, kv_dtype=torch.int8)
