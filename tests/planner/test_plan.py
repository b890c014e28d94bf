"""Meshes as text, the heaviest rank of each stage, room for keys and values."""

from __future__ import annotations

import pytest

from engine.config import EngineConfig, ParallelConfig
from engine.errors import ConfigError
from engine.parallel.schedule import peak_activations, schedule
from engine.planner.machine import Machine
from engine.planner.plan import activations_in_flight, make_plan, parse_mesh, placement_of, plan_rank, world_size
from engine.planner.share import Share
from tests.tiny import tiny_config


def test_mesh_is_read_with_axes_in_any_order() -> None:
    assert parse_mesh("tp=8, pp=3,dp=2") == ParallelConfig(dp=2, pp=3, cp=1, tp=8)
    assert parse_mesh("", schedule="gpipe") == ParallelConfig(dp=1, schedule="gpipe")


@pytest.mark.parametrize(("text", "complaint"), [
    ("ddp=2", 'axis "ddp" .did you mean "dp"'),
    ("tp=0", '"tp=0"; each axis'),
    ("tp=two", '"tp=two"'),
    ("tp", '"tp"; each axis'),
    ("tp=2,tp=4", "a second"),
])  # fmt: skip
def test_mesh_that_cannot_be_read_is_refused_with_its_words(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_mesh(text)


@pytest.mark.parametrize(("mesh", "overrides", "complaint"), [
    ("tp=3", {}, "4 attention heads"),
    ("pp=3", {}, "2 layers cannot be dealt to 3"),
    ("tp=4", {"intermediate_size": 48}, "48 rows .* leave nothing for rank"),
])  # fmt: skip
def test_mesh_that_does_not_divide_the_model_is_refused(mesh: str, overrides: dict, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_plan(tiny_config(**overrides), EngineConfig(parallel=parse_mesh(mesh)), Machine())


def test_dtype_of_tests_has_no_plan() -> None:
    with pytest.raises(ConfigError, match=r'float32 and bfloat16; EngineConfig\.dtype is "float64"'):
        make_plan(tiny_config(), EngineConfig(dtype="float64", parallel=parse_mesh("")), Machine())


def test_open_number_of_replicas_is_refused() -> None:
    with pytest.raises(ConfigError, match="give dp"):
        make_plan(tiny_config(), EngineConfig(), Machine())


@pytest.mark.parametrize("mesh", ["tp=4,dp=3", "pp=3,cp=2", "tp=2,pp=2,dp=2"])
def test_the_planned_rank_of_a_stage_is_the_heaviest(mesh: str) -> None:
    model = tiny_config(num_hidden_layers=5, vocab_size=304 + 16)
    config = EngineConfig(parallel=parse_mesh(mesh))
    plan = make_plan(model, config, Machine(), micro_batches=4)
    for rank in range(world_size(config.parallel)):
        share = Share(model, config, placement_of(config.parallel, rank), config.train_batch_tokens)
        assert plan_rank(share, 4).total <= plan.stages[share.mesh.pp.index].total


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "zero_bubble"])
@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 9), (3, 3), (4, 32), (4, 37), (6, 61), (5, 2)])
def test_activations_in_flight_are_the_schedules_peak(name: str, stages: int, micro_batches: int) -> None:
    parallel = ParallelConfig(dp=1, pp=stages, schedule=name)
    peaks = peak_activations(schedule(name, stages, micro_batches, parallel.chunks_per_stage))
    assert [activations_in_flight(parallel, stage, micro_batches) for stage in range(stages)] == peaks


def test_pool_is_what_the_fullest_stage_has_room_for() -> None:
    model = tiny_config(num_hidden_layers=3)
    config = EngineConfig(parallel=parse_mesh("pp=2"), train_batch_tokens=256, kv_tokens=64)
    memory = 200e6
    plan = make_plan(model, config, Machine(memory_gb=memory / 1e9))
    rooms = [(memory - rank.total) / rank.kv_token_bytes for rank in plan.stages]
    assert plan.kv_tokens is not None
    assert min(rooms) - config.page_size < plan.kv_tokens <= min(rooms)
    assert plan.kv_tokens % config.page_size == 0 and plan.fits


def test_what_does_not_fit_has_no_room() -> None:
    plan = make_plan(tiny_config(), EngineConfig(parallel=parse_mesh("")), Machine(memory_gb=1e-6))
    assert plan.kv_tokens == 0 and plan.fits is False


def test_room_is_unknown_for_a_machine_without_a_size() -> None:
    plan = make_plan(tiny_config(), EngineConfig(parallel=parse_mesh("")), Machine())
    assert plan.kv_tokens is None and plan.fits is None


def test_more_replicas_share_the_optimizer_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.parallel.ownership.BLOCK_ELEMENTS", 1 << 10)
    model = tiny_config(vocab_size=512)
    one, four = (
        make_plan(model, EngineConfig(parallel=parse_mesh(mesh)), Machine()).stages[0] for mesh in ("tp=2", "tp=2,dp=4")
    )
    assert four.num_bytes["weights"] == one.num_bytes["weights"]
    assert four.num_bytes["gradients"] == one.num_bytes["gradients"]
    share = one.num_bytes["optimizer"] / 4
    assert share <= four.num_bytes["optimizer"] < 1.1 * share  # whole blocks
    assert four.num_bytes["gradient sums"] * 3 == four.num_bytes["optimizer"]
