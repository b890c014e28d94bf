"""Attention's backward for Hopper: gradients against autograd in float64, and one set of bits whatever the schedule of
warps, and however late copies and products are done. In the simulator, or on a GPU of compute capability 9."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import pytest
import torch
from torch import Tensor

from engine.kernels.attention import AttentionPlan, AttentionSpec
from engine.kernels.attention_call import AttentionCall
from engine.kernels.triton.launch import Launch, collecting
from engine.kernels.weight import Weight
from tests.kernels.cases import assert_near
from tests.kernels.triton.cases import DEVICE
from tests.kernels.triton.test_attention_backward import exact_gradients, example, gradients, norms_of, rope_of
from tests.ptx.launches import simulated
from tests.row_invariance import assert_same_bits

ON_GPU = DEVICE == "cuda"
pytestmark = pytest.mark.skipif(
    ON_GPU and torch.cuda.get_device_capability()[0] != 9, reason="these kernels are for compute capability 9"
)
WIDE, BF16 = AttentionSpec(4, 2, 128), torch.bfloat16
NARROW, FP16 = AttentionSpec(6, 2, 64, window=50), torch.float16  # of a token's four rows, one is no head's
NAMES = ("d_q", "d_kv", "d_q_norm", "d_k_norm")


def hopper(
    qkv: Tensor,
    d_out: Tensor,
    spec: AttentionSpec,
    lengths: list[int],
    norms: list[Weight] | None = None,
    segments: list[tuple[int, int]] | None = None,
    **options,
) -> tuple[list[Tensor], list[Launch]]:
    """And the launches, where they are simulated: a GPU schedules as it will, and takes no options."""
    from engine.kernels.hopper.attention_backward import backward

    with nullcontext([]) if ON_GPU else simulated(**options) as launches:
        found = gradients(qkv, d_out, spec, lengths, norms, segments, backward=backward)
    return found, launches


@pytest.mark.parametrize(("spec", "dtype"), [(WIDE, BF16), (NARROW, FP16)], ids=["wide", "narrow"])
def test_gradients_are_those_of_the_definition_in_double(spec, dtype):
    lengths = [9, 130, 2]  # tiles that are full, and tiles that are mostly of other sequences
    qkv, d_out = example(spec, dtype, sum(lengths))
    norms = norms_of(spec, dtype) if spec is WIDE else None
    found, launches = hopper(qkv, d_out, spec, lengths, norms)
    assert ON_GPU or {"grad_queries", "grad_keys"} <= {launch.name for launch in launches if launch.gluon}
    for actual, exact in zip(found, exact_gradients(qkv, d_out, spec, lengths, norms), strict=True):
        assert_near(actual.cpu(), exact, dtype, ulps=4.0)


@cache
def in_order() -> list[Tensor]:
    return long_walks("in order", "early", 0)


def long_walks(schedule: str, completion: str, seed: int) -> list[Tensor]:
    """Rings of 4 stages go round, and some programs take two tiles of rows."""
    qkv, d_out = example(WIDE, BF16, 160)
    norms = norms_of(WIDE, BF16)
    return hopper(qkv, d_out, WIDE, [160], norms, schedule=schedule, completion=completion, seed=seed)[0]


@pytest.mark.parametrize("mode", [("random", "early", 1), ("random", "late", 2)], ids=str)
def test_no_schedule_changes_a_bit(mode):
    for name, one, other in zip(NAMES, in_order(), long_walks(*mode), strict=True):
        assert_same_bits(one, other, name)


@pytest.mark.parametrize(
    ("spec", "dtype", "lengths"), [(WIDE, BF16, [7, 75, 33]), (NARROW, FP16, [40, 9, 70])], ids=["wide", "narrow"]
)
def test_nan_in_other_sequences_stays_there(spec, dtype, lengths):
    qkv, d_out = example(spec, dtype, sum(lengths))
    own = slice(lengths[0], lengths[0] + lengths[1])
    norms = norms_of(spec, dtype) if spec is WIDE else None
    clean, _ = hopper(qkv, d_out, spec, lengths, norms)
    for x in (qkv, d_out):
        kept = x[own].clone()
        x.fill_(float("nan"))
        x[own] = kept
    found, _ = hopper(qkv, d_out, spec, lengths, norms)
    for name, one, other in zip(NAMES[:2], clean, found, strict=False):  # norms sum over all sequences
        assert_same_bits(one[own], other[own], name)


def test_a_sequence_has_the_bits_that_it_has_alone():
    qkv, d_out = example(NARROW, FP16, 57)
    alone, _ = hopper(qkv[7:48].contiguous(), d_out[7:48].contiguous(), NARROW, [41])
    batched, _ = hopper(qkv, d_out, NARROW, [7, 41, 9])
    for name, one, other in zip(NAMES, alone, batched, strict=False):
        assert_same_bits(one, other[7:48], name)


def test_queries_of_segments_give_their_part_of_the_keys_gradient():
    qkv, d_out = example(NARROW, FP16, 130)
    segments = [(20, 50), (100, 104)]
    found, _ = hopper(qkv, d_out, NARROW, [100, 30], segments=segments)
    rows = torch.cat([torch.arange(*segment) for segment in segments])
    theirs = torch.zeros_like(d_out)
    theirs[rows] = d_out[rows]
    d_q, d_kv = exact_gradients(qkv, theirs, NARROW, [100, 30], None)
    assert_near(found[0].cpu(), d_q[rows], FP16, ulps=4.0)
    assert_near(found[1].cpu(), d_kv, FP16, ulps=4.0)


def test_without_queries_keys_have_gradients_of_zero():
    qkv, d_out = example(NARROW, FP16, 30)
    (d_q, d_kv), _ = hopper(qkv, d_out, NARROW, [30], segments=[])
    assert d_q.shape == (0, 384) and d_kv.shape == (30, 256) and not d_kv.any()


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [(AttentionSpec(5, 1, 128), BF16), (AttentionSpec(4, 1, 96), BF16), (WIDE, torch.float32)],
    ids=["3 rows of 8 are no head's", "96 columns", "float32"],
)
def test_other_shapes_go_to_the_plain_kernels(spec, dtype):
    from engine.kernels.hopper.attention_backward import backward

    qkv, d_out = (torch.empty(16, columns, dtype=dtype) for columns in (spec.row_size, spec.num_heads * spec.head_dim))
    with collecting() as launches:
        call = AttentionCall(qkv, spec, rope_of(spec), AttentionPlan.of_sequences([16]))
        backward(call, d_out, d_out, torch.empty(16, spec.num_heads))
    assert "_grad_keys" in {launch.name for launch in launches} and not any(launch.gluon for launch in launches)
