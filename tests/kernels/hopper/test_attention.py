"""Attention for Hopper (Gluon) with tiles of production in bfloat16: what it computes, that items of few rows have
the bits of items of many, and that neither schedule nor late copies and products change a bit."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels.attention import AttentionSpec
from engine.kernels.rope import rope_table
from tests.kernels.cases import assert_near, randn
from tests.kernels.test_attention import definition, plan_of
from tests.kernels.triton.test_attention import Cache, forward
from tests.ptx.launches import simulated
from tests.row_invariance import assert_same_bits

DTYPE = torch.bfloat16
SPEC = AttentionSpec(4, 1, 128)
# 3 query heads a key head, which do not divide 64: the consumers load queries; a window that ends within a tile
SPECIAL = AttentionSpec(3, 1, 64, window=100)
LENGTHS, SPLIT = [1, 70, 300], 256  # sequences of one and of two splits; production's are of 512 keys
PIECES = [[1], [64, 5, 1], [1, 255, 43, 1]]  # decode, and prefill in pieces that end within tiles and pages


def options(spec: AttentionSpec) -> dict[str, Any]:
    from engine.kernels.hopper.attention import tiles_of, walk

    tiles = replace(tiles_of(spec, DTYPE, torch.device("cpu")), split=SPLIT)
    return {"rope": rope_table(spec.head_dim, 10000.0, None, max(LENGTHS)), "tiles": tiles, "walk": walk}


def inputs(spec: AttentionSpec) -> Tensor:
    return randn(sum(LENGTHS), spec.row_size).to(DTYPE)


def trained(spec: AttentionSpec, qkv: Tensor, **chosen: Any) -> tuple[Tensor, Tensor]:
    return forward(qkv, spec, plan_of(LENGTHS), want_lse=True, **{**options(spec), **chosen})


@cache
def expected(spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    with simulated() as launches:
        found = trained(spec, inputs(spec))
    assert {launch.constants["CONSUMERS"] for launch in launches if launch.name == "walk"} == {1, 2}
    return found


def cached(spec: AttentionSpec) -> Tensor:
    """What PIECES come to, with pages that hold NaN wherever nothing was written."""
    return Cache(spec, DTYPE, LENGTHS, 16).run(inputs(spec), PIECES, **options(spec))


@pytest.mark.parametrize("spec", [SPEC, SPECIAL])
def test_training_forward_is_that_of_the_definition(spec: AttentionSpec) -> None:
    exact = definition(inputs(spec).double(), spec, options(spec)["rope"], LENGTHS, None, None)
    assert_near(expected(spec)[0], exact, DTYPE)


def test_the_bits_are_those_of_plain_triton_with_as_many_keys_a_tile() -> None:
    with simulated():
        out, lse = trained(
            SPEC, inputs(SPEC), walk=None, tiles=replace(options(SPEC)["tiles"], warps=8, decode_stages=2)
        )
    assert_same_bits(out, expected(SPEC)[0], "output")
    assert_same_bits(lse, expected(SPEC)[1], "lse")


def test_chunked_prefill_and_decode_have_the_bits_of_training() -> None:
    with simulated() as launches:
        out = cached(SPEC)
    assert {launch.name for launch in launches} >= {"walk", "_fold_parts"}
    assert_same_bits(out, expected(SPEC)[0], "with pages")


def test_a_nan_stays_in_its_sequence() -> None:
    qkv = inputs(SPEC)
    qkv[71:] = float("nan")  # the keys and values of the last sequence, which lie behind those of the second
    with simulated():
        out, _ = trained(SPEC, qkv)
    assert_same_bits(out[:71], expected(SPEC)[0][:71], "the sequences before")
    assert out[71:].isnan().all()


@pytest.mark.parametrize(("completion", "seed"), [("late", 0), ("early", 1), ("late", 2)])
def test_no_schedule_changes_a_bit(completion: str, seed: int) -> None:
    with simulated("random", completion, seed):
        out, lse = trained(SPEC, inputs(SPEC))
    assert_same_bits(out, expected(SPEC)[0], "output")
    assert_same_bits(lse, expected(SPEC)[1], "lse")


def test_no_schedule_changes_a_bit_of_what_pages_hold() -> None:
    with simulated("random", "late", 3):
        out = cached(SPEC)
    assert_same_bits(out, expected(SPEC)[0], "with pages")


def test_a_reserved_plan_launches_all_programs_and_reads_what_there_is_to_do() -> None:
    """As under a CUDA graph: rows past the batch hold NaN, and nothing is written for them."""
    plan = plan_of(LENGTHS)
    on_device = plan.on_device(torch.device("cpu"))
    on_device.reserve(sum(LENGTHS) + 13, 8, 0)
    on_device.upload(plan)
    qkv = torch.cat([inputs(SPEC), torch.full((13, SPEC.row_size), float("nan"), dtype=DTYPE)])
    with simulated() as launches:
        out = forward(qkv, SPEC, plan, **options(SPEC))
    assert [launch.constants["CONSUMERS"] for launch in launches if launch.name == "walk"] == [2, 1]
    assert_same_bits(out[: sum(LENGTHS)], expected(SPEC)[0], "output")
