"""Attention's backward in Triton: gradients against autograd of the definition in float64, and the same bits each time.

Tiles are small here, so that 41 keys are several of them, and the forward's results come from the definition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import log

import pytest
import torch
from torch import Tensor

from engine.kernels.attention import AttentionPlan, AttentionSpec, attention
from engine.kernels.attention_call import AttentionCall
from engine.kernels.op import use_backend
from engine.kernels.rope import apply_rope, rope_table
from engine.kernels.weight import Weight
from tests.kernels.cases import assert_near, grad_of, randn
from tests.kernels.test_attention import definition, int32, plan_of
from tests.kernels.triton.cases import DEVICE, DTYPES, needs_triton, norms_of
from tests.row_invariance import assert_same_bits

pytestmark = needs_triton
LENGTHS = [9, 7, 41]
# (H, K, Dh, window, norms): 1 to 4 query heads a key head, a group that does not divide a tile and one larger than it,
# widths that are no power of two, windows shorter and longer than a tile.
SHAPES = [(2, 2, 16, None, True), (3, 1, 48, 20, True), (4, 2, 80, None, True), (4, 1, 32, 5, False),
          (17, 1, 16, 20, True)]  # fmt: skip
ULPS = {torch.float32: 16.0, torch.float16: 4.0, torch.bfloat16: 4.0}
NAMES = ("d_q", "d_kv", "d_q_norm", "d_k_norm")


def rope_of(spec: AttentionSpec) -> Tensor:
    return rope_table(spec.head_dim, 10000.0, None, 320)


def example(spec: AttentionSpec, dtype: torch.dtype, length: int = sum(LENGTHS)) -> tuple[Tensor, Tensor]:
    """qkv and d_out."""
    heads = spec.num_heads * spec.head_dim
    return randn(length, spec.row_size).to(DEVICE, dtype), randn(length, heads, seed=1).to(DEVICE, dtype)


def of_definition(qkv: Tensor, spec: AttentionSpec, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """out and lse without norms, in float64."""
    if not lengths:
        return torch.empty(0, spec.num_heads * spec.head_dim), torch.empty(0, spec.num_heads)
    out = definition(qkv.double().cpu(), spec, rope_of(spec).double(), lengths, None, None)
    logs = []
    for part in qkv.double().cpu().split(lengths):
        at = torch.arange(len(part))
        heads = part.view(len(part), -1, spec.head_dim)
        q, k, _ = heads.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], 1)
        q, k = (apply_rope(x, rope_of(spec).double(), at) for x in (q, k))
        k = k.repeat_interleave(spec.num_heads // spec.num_kv_heads, 1)
        visible = (at[None] <= at[:, None]) & (at[None] > at[:, None] - (spec.window or len(part)))
        scores = torch.einsum("qhd,khd->qhk", q, k).mul(spec.scale).masked_fill(~visible[:, None], float("-inf"))
        logs.append(scores.logsumexp(-1) / log(2))
    return out, torch.cat(logs)


def normed(qkv: Tensor, spec: AttentionSpec, norms: list[Weight]) -> Tensor:
    """qkv with queries and keys normed, in float64."""
    x = qkv.double().unflatten(1, (-1, spec.head_dim)).clone()
    for norm, heads in zip(norms, (slice(0, spec.num_heads), slice(spec.num_heads, -spec.num_kv_heads)), strict=True):
        x[:, heads] = torch.nn.functional.rms_norm(x[:, heads], (spec.head_dim,), norm.data.double(), spec.eps)
    return x.flatten(1)


def small_tiles():
    from engine.kernels.triton.attention_backward import Tiles

    return Tiles(query_rows=32, query_keys=16, key_keys=16, key_rows=32, num_warps=4, num_stages=1)


def gradients(
    qkv: Tensor,
    d_out: Tensor,
    spec: AttentionSpec,
    lengths: list[int],
    norms: list[Weight] | None,
    segments: list[tuple[int, int]] | None = None,
    tiles: object = None,
    backward: Callable[..., tuple[Tensor, Tensor | None]] | None = None,
) -> list[Tensor]:
    """d_q, d_kv, and, with norms, d_q_norm, d_k_norm; of the queries in `segments` alone where these are given. From
    the plain kernels in small tiles, or from another `backward`."""
    from engine.kernels.triton.attention_backward import backward as plain

    queries = spec.num_heads * spec.head_dim
    out, lse = of_definition(qkv if norms is None else normed(qkv, spec, norms), spec, lengths)
    out, lse = out.to(DEVICE, qkv.dtype), lse.float().to(DEVICE)
    plan, kv, x = plan_of(lengths), None, qkv
    if segments is not None:
        plan = AttentionPlan(plan)
        plan.build_segments(int32([begin for begin, _ in segments]), int32([end for _, end in segments]))
        rows = plan.rows().to(DEVICE)
        x, kv, d_out, out, lse = qkv[rows, :queries], qkv[:, queries:], d_out[rows], out[rows], lse[rows]
    weights = norms or [None, None]
    call = AttentionCall(x, spec, rope_of(spec).to(DEVICE), plan, None, None, *weights, kv)
    backward = backward or partial(plain, tiles=tiles or small_tiles())
    d_x, d_kv = backward(call, d_out, out, lse)
    d_q, d_kv = (d_x, d_kv) if d_kv is not None else (d_x[:, :queries], d_x[:, queries:])
    return [d_q, d_kv, *(norm.grad_buffer() for norm in norms or [])]


def exact_gradients(qkv: Tensor, d_out: Tensor, spec: AttentionSpec, lengths: list[int],
                    norms: list[Weight] | None) -> list[Tensor]:  # fmt: skip
    x = qkv.double().cpu().requires_grad_()
    weights = [norm.data.double().cpu().requires_grad_() for norm in norms or []]
    definition(x, spec, rope_of(spec), lengths, *(weights or (None, None))).backward(d_out.double().cpu())
    queries = spec.num_heads * spec.head_dim
    return [grad_of(x)[:, :queries], grad_of(x)[:, queries:], *map(grad_of, weights)]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, torch.float32) for shape in SHAPES] + [(shape, dtype) for shape in SHAPES[1:3] for dtype in DTYPES[1:]],
)
def test_gradients_are_those_of_the_definition_in_double(shape, dtype):
    *sizes, with_norms = shape
    spec = AttentionSpec(*sizes)
    qkv, d_out = example(spec, dtype)
    norms = norms_of(spec, dtype) if with_norms else None
    ours = gradients(qkv, d_out, spec, LENGTHS, norms)
    assert ours[0].dtype == ours[1].dtype == dtype
    for actual, exact in zip(ours, exact_gradients(qkv, d_out, spec, LENGTHS, norms), strict=True):
        assert_near(actual.cpu(), exact, dtype, ulps=ULPS[dtype])


def test_wide_heads_go_back_through_rope_and_norm_in_a_launch_of_their_own():
    from engine.kernels.triton.attention_backward import tiles_for

    assert tiles_for(256, torch.bfloat16).apart and not tiles_for(128, torch.bfloat16).apart
    spec = AttentionSpec(3, 1, 48, window=20)
    qkv, d_out = example(spec, torch.float32)
    norms = norms_of(spec, torch.float32)
    ours = gradients(qkv, d_out, spec, LENGTHS, norms, tiles=replace(small_tiles(), apart=True))
    for actual, exact in zip(ours, exact_gradients(qkv, d_out, spec, LENGTHS, norms), strict=True):
        assert_near(actual.cpu(), exact, torch.float32, ulps=ULPS[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_of_production_give_the_gradients_of_the_definition(dtype):
    from engine.kernels.triton.attention_backward import tiles_for

    spec, lengths = AttentionSpec(2, 1, 32, window=140, scale=0.3), [9, 170]
    qkv, d_out = example(spec, dtype, sum(lengths))
    ours = gradients(qkv, d_out, spec, lengths, None, tiles=tiles_for(spec.head_dim, dtype))
    for actual, exact in zip(ours, exact_gradients(qkv, d_out, spec, lengths, None), strict=True):
        assert_near(actual.cpu(), exact, dtype, ulps=ULPS[dtype])


@pytest.mark.parametrize("dtype", DTYPES[-1:])
def test_the_same_call_has_the_same_bits_twice_and_a_sequence_those_that_it_has_alone(dtype):
    spec = AttentionSpec(3, 1, 32, window=20)
    qkv, d_out = example(spec, dtype)
    batch, again = (gradients(qkv, d_out, spec, LENGTHS, norms_of(spec, dtype)) for _ in range(2))
    for name, one, other in zip(NAMES, batch, again, strict=True):
        assert_same_bits(other, one, name)
    parts = [x.split(LENGTHS) for x in (qkv, d_out, *batch[:2])]
    for s, (own_qkv, own_d_out, *expected) in enumerate(zip(*parts, strict=True)):
        alone = gradients(own_qkv.contiguous(), own_d_out.contiguous(), spec, [LENGTHS[s]], norms_of(spec, dtype))
        for name, one, other in zip(NAMES, expected, alone, strict=False):
            assert_same_bits(other, one, f"{name} of sequence {s}")


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_what_is_wrong_in_one_sequence_stays_there():
    spec = AttentionSpec(3, 1, 16)
    qkv, d_out = example(spec, torch.float32, 37)
    clean = gradients(qkv, d_out, spec, [9, 7, 21], None)
    qkv[9:16] = float("nan")
    d_out[9:16] = float("inf")
    for name, one, other in zip(NAMES, clean, gradients(qkv, d_out, spec, [9, 7, 21], None), strict=False):
        assert other[9:16].isnan().any()
        for rows in (slice(0, 9), slice(16, 37)):
            assert_same_bits(other[rows], one[rows], name)


def test_gradients_of_the_norms_add_up():
    spec = AttentionSpec(2, 1, 16)
    norms = norms_of(spec, torch.float32)
    qkv, d_out = example(spec, torch.float32, 9)
    once = [gradient.clone() for gradient in gradients(qkv, d_out, spec, [9], norms)[2:]]
    twice = gradients(qkv, d_out, spec, [9], norms)[2:]
    for one, two in zip(once, twice, strict=True):
        assert one.abs().max() > 0
        assert_same_bits(two, 2 * one, "gradient of a norm")


@pytest.mark.parametrize("dtype", DTYPES[-1:])
def test_gradients_of_context_parallel_ranks_add_up_to_those_of_one(dtype):
    spec = AttentionSpec(2, 1, 32, window=25)
    qkv, d_out = example(spec, dtype)
    ranks = [[(0, 5), (16, 23), (50, 57)], [(5, 9), (9, 16), (23, 50)]]
    exact = exact_gradients(qkv, d_out, spec, LENGTHS, norms_of(spec, dtype))
    found = [gradients(qkv, d_out, spec, LENGTHS, norms_of(spec, dtype), segments) for segments in ranks]
    for actual, rows in zip(found, ranks, strict=True):
        mine = torch.cat([torch.arange(begin, end) for begin, end in rows])
        assert_near(actual[0].cpu(), exact[0][mine], dtype, ulps=ULPS[dtype])
    for i in range(1, 4):
        assert_near(sum(each[i].float() for each in found).cpu(), exact[i], dtype, ulps=2 * ULPS[dtype])


def test_a_rank_that_holds_all_rows_has_the_bits_of_one_and_a_rank_without_rows_has_zeros():
    spec = AttentionSpec(2, 1, 16, window=25)
    qkv, d_out = example(spec, torch.float32)
    alone = gradients(qkv, d_out, spec, LENGTHS, norms_of(spec, torch.float32))
    whole = gradients(qkv, d_out, spec, LENGTHS, norms_of(spec, torch.float32), [(0, 9), (9, 16), (16, 30), (30, 57)])
    for name, one, other in zip(NAMES, alone, whole, strict=True):
        assert_same_bits(other, one, name)
    d_q, d_kv, *d_norms = gradients(qkv, d_out, spec, LENGTHS, norms_of(spec, torch.float32), [])
    assert d_q.shape == (0, 32) and d_kv.shape == (57, 32)
    assert not any(gradient.any() for gradient in (d_kv, *d_norms))


@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn])
def test_the_public_op_trains(kv_dtype):
    """Forward and backward kernels together, with pages of the model's dtype and with rounded keys and values."""
    spec = AttentionSpec(4, 2, 32, window=20, kv_dtype=kv_dtype)
    qkv, d_out = example(spec, torch.float32, 16)
    results = []
    for backend in ("triton", "torch"):
        x, norms = qkv.clone().requires_grad_(), norms_of(spec, torch.float32)
        with use_backend(backend):
            attention(x, spec, rope_of(spec).to(DEVICE), plan_of([9, 7]), None, None, *norms).backward(d_out)
        results.append([grad_of(x), *map(grad_of, norms)])
    for ours, exact in zip(*results, strict=True):
        assert_near(ours, exact, torch.float32, ulps=32.0)


def test_rows_past_the_plans_have_gradients_of_zero():
    from engine.kernels.triton.attention_backward import backward

    spec = AttentionSpec(2, 1, 16)
    qkv, d_out = example(spec, torch.float32, 12)
    out, lse = of_definition(qkv, spec, [12])
    call = AttentionCall(qkv, spec, rope_of(spec).to(DEVICE), plan_of([10]))
    d_qkv, _ = backward(call, d_out, out.to(DEVICE, qkv.dtype), lse.float().to(DEVICE))
    assert d_qkv[:10].any(1).all() and not d_qkv[10:].any()


def test_no_rows_have_no_gradients():
    spec = AttentionSpec(2, 1, 16)
    norms = norms_of(spec, torch.float32)
    nothing = torch.empty(0, spec.row_size, device=DEVICE)
    d_q, d_kv, *d_norms = gradients(nothing, torch.empty(0, 32, device=DEVICE), spec, [], norms)
    assert d_q.shape == (0, 32) and d_kv.shape == (0, 32)
    assert not any(gradient.any() for gradient in d_norms)


def test_tiles_of_the_longest_walks_come_first():
    from engine.kernels.triton.attention_backward import work_lists

    rows, keys = work_lists(plan_of([40, 10, 20]), 2, 0, small_tiles())
    # 80, 20 and 40 rows in tiles of 32; the last key that a tile sees: 15, 31, 39 | 9 | 15, 19
    assert rows.tolist() == [[0, 40, 64, 0], [0, 40, 32, 0], [50, 70, 32, 50], [0, 40, 0, 0], [50, 70, 0, 50],
                             [40, 50, 0, 40]]  # fmt: skip
    # keys 0, 16, 32 | 0 | 0, 16 of the sequences: 40, 24, 8 | 10 | 20, 4 tokens see one of theirs
    assert keys.tolist() == [[0, 0, 16, 0, 15, 40, 40], [0, 16, 16, 16, 31, 40, 40], [50, 0, 16, 50, 65, 70, 70],
                             [40, 0, 10, 40, 50, 50, 50], [0, 32, 8, 32, 40, 40, 40],
                             [50, 16, 4, 66, 70, 70, 70]]  # fmt: skip
    windowed = work_lists(plan_of([40]), 2, 10, small_tiles())[1]
    # of keys 0 .. 15, key 0 is hidden from token 10 on, key 15 from token 25 on
    assert windowed[0].tolist() == [0, 0, 16, 0, 15, 10, 25]
