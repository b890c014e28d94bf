"""Meshes are tried, kept where they fit, and ranked by time."""

from __future__ import annotations

import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.planner.machine import Machine
from engine.planner.search import search
from tests.tiny import tiny_config

MODEL = tiny_config(num_hidden_layers=4, vocab_size=512, intermediate_size=256)
CONFIG = EngineConfig(train_batch_tokens=128, kv_tokens=256, max_batch_tokens=64)
ROOMY = Machine(name="m", peak_tflops=1.0, memory_gb=1.0, intra_gbps=10.0, inter_gbps=1.0, ranks_per_node=4)


def test_every_proposal_uses_all_ranks_fits_and_none_is_faster_than_the_one_before() -> None:
    plans = search(MODEL, CONFIG, ROOMY, 8, step_tokens=8192)
    assert {plan.world_size for plan in plans} == {8}
    assert all(plan.fits for plan in plans)
    rates = [plan.tokens_per_second for plan in plans]
    assert None not in rates and rates == sorted(rates, reverse=True)


def test_all_divisions_that_the_model_allows_are_tried() -> None:
    plans = search(MODEL, CONFIG, ROOMY, 8, step_tokens=8192)
    found = {(p.config.parallel.dp, p.config.parallel.pp, p.config.parallel.cp, p.config.parallel.tp) for p in plans}
    axes = (1, 2, 4, 8)
    possible = {(dp, pp, cp, tp) for dp in axes for pp in axes for cp in axes for tp in axes if dp * pp * cp * tp == 8}
    allowed = {mesh for mesh in possible if mesh[1] <= 4 and mesh[2] <= 4 and mesh[3] <= 4}
    assert found == allowed  # 4 layers; 128 tokens in pieces of 16, two a rank; 4 heads and 4 ranks a node


def test_memory_decides_what_is_left() -> None:
    """With half the memory of what one copy of everything needs, no mesh without tp or pp is proposed."""
    plans = search(MODEL, CONFIG, ROOMY, 8, step_tokens=8192)
    alone = [p for p in plans if p.config.parallel.tp == p.config.parallel.pp == 1]
    least = min(rank.total + rank.kv_token_bytes * 256 for plan in alone for rank in plan.stages)
    tight = Machine(name="m", peak_tflops=1.0, memory_gb=(least - 1) / 1e9, intra_gbps=10.0, inter_gbps=1.0)
    left = search(MODEL, CONFIG, tight, 8, step_tokens=8192)
    assert left and all(plan.config.parallel.tp * plan.config.parallel.pp > 1 for plan in left)


def test_a_model_too_large_for_the_ranks_says_what_came_nearest() -> None:
    tiny = Machine(name="m", peak_tflops=1.0, memory_gb=1e-3, intra_gbps=1.0, inter_gbps=1.0)
    with pytest.raises(
        ConfigError, match=r"no mesh of 4 ranks fits 0.001 GB; the nearest \(.*\) needs .* use more ranks"
    ):
        search(MODEL, CONFIG, tiny, 4, step_tokens=8192)


def test_number_of_ranks_that_nothing_divides_into_is_refused() -> None:
    with pytest.raises(ConfigError, match="no mesh of 1000 ranks divides"):
        search(MODEL, CONFIG, ROOMY, 1000, step_tokens=128)


def test_ranking_asks_for_the_figures_that_it_lacks() -> None:
    with pytest.raises(ConfigError, match='needs intra_gbps, peak_tflops, which the machine "m"'):
        search(MODEL, CONFIG, Machine(name="m", memory_gb=1.0), 2, step_tokens=8192)
    with pytest.raises(ConfigError, match="needs the memory of a rank"):
        search(MODEL, CONFIG, Machine(name="m", peak_tflops=1.0, intra_gbps=1.0), 2, step_tokens=8192)
