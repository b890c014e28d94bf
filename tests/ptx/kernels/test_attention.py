"""Attention with the tiles and matrix instructions of production on Hopper, in bfloat16: one set of bits in every mode,
under any schedule of warps and however late copies and products are done."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from engine.kernels.attention import AttentionSpec
from engine.kernels.rope import rope_table
from tests.kernels.cases import assert_near, randn
from tests.kernels.test_attention import definition, plan_of
from tests.kernels.triton.test_attention import Cache, forward, norms_of
from tests.ptx.launches import simulated
from tests.row_invariance import assert_same_bits

SPEC, DTYPE = AttentionSpec(8, 2, 128), torch.bfloat16
LENGTHS, SPLIT = [1, 70, 200], 128  # one and two splits of two tiles: production's are of 512 keys
MODES = [
    ("prefill", [[1], [70], [200]]),
    ("chunks", [[1], [33, 37], [128, 40, 32]]),
    ("decode", [[1], [69, 1], [126, 1, 1, 1, 71]]),
]


def options() -> dict:
    from engine.kernels.triton.attention import tiles_of

    tiles = replace(tiles_of(SPEC, DTYPE, torch.device("cpu")), split=SPLIT)
    return {"norms": norms_of(SPEC, DTYPE), "rope": rope_table(128, 10000.0, None, max(LENGTHS)), "tiles": tiles}


def inputs() -> Tensor:
    return randn(sum(LENGTHS), SPEC.row_size).to(DTYPE)


@cache
def trained() -> tuple[Tensor, Tensor]:
    with simulated() as launches:
        found = forward(inputs(), SPEC, plan_of(LENGTHS), want_lse=True, **options())
    assert {(launch.name, launch.constants.get("BLOCK_M")) for launch in launches} >= {("_attend", 128)}
    return found


def test_training_forward_is_that_of_the_definition():
    norms = [norm.data.double() for norm in norms_of(SPEC, DTYPE)]
    exact = definition(inputs().double(), SPEC, options()["rope"], LENGTHS, *norms)
    assert_near(trained()[0], exact, DTYPE)


@pytest.mark.parametrize(("mode", "pieces"), MODES, ids=[mode for mode, _ in MODES])
def test_every_mode_has_the_bits_of_training(mode, pieces):
    with simulated() as launches:
        out = Cache(SPEC, DTYPE, LENGTHS, 16).run(inputs(), pieces, **options())
    assert_same_bits(out, trained()[0], mode)
    if mode == "decode":
        assert any(launch.name == "_attend" and launch.constants["BLOCK_M"] == 64 for launch in launches)
        assert any(launch.name == "_fold_parts" for launch in launches)


def test_no_schedule_changes_a_bit():
    with simulated("random", "late"):
        out, lse = forward(inputs(), SPEC, plan_of(LENGTHS), want_lse=True, **options())
    assert_same_bits(out, trained()[0], "training")
    assert_same_bits(lse, trained()[1], "lse")


def test_no_schedule_changes_a_bit_of_decode():
    with simulated("random", "late", seed=1):
        out = Cache(SPEC, DTYPE, LENGTHS[:2], 16).run(inputs()[:71], [[1], [69, 1]], **options())
    assert_same_bits(out, trained()[0][:71], "decode")
