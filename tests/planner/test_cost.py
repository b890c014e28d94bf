"""Times follow from FLOPs, bytes and the machine's figures."""

from __future__ import annotations

import pytest

from engine.config import EngineConfig, ParallelConfig
from engine.parallel.schedule import Costs, bubble_fraction, schedule, simulate
from engine.planner import cost
from engine.planner.machine import Machine
from engine.planner.plan import make_plan
from tests.planner.test_footprint import share_of
from tests.tiny import tiny_config

MACHINE = Machine(peak_tflops=100.0, memory_gb=80.0, intra_gbps=100.0, inter_gbps=10.0, ranks_per_node=4)


@pytest.mark.parametrize(("tokens", "window"), [(1, None), (10, None), (10, 3), (10, 10), (7, 40)])
def test_keys_per_query_is_the_mean_over_a_causal_sequence(tokens: int, window: int | None) -> None:
    counted = sum(min(position + 1, window or tokens) for position in range(tokens)) / tokens
    assert cost.keys_per_query(tokens, window) == pytest.approx(counted)


def test_shards_compute_what_the_whole_model_does() -> None:
    """The FLOPs of all tensor-parallel ranks and stages together are those of one rank."""
    model = tiny_config(num_hidden_layers=4, vocab_size=512, intermediate_size=128)
    alone = EngineConfig(parallel=ParallelConfig(dp=1), train_batch_tokens=64)
    whole = cost.micro_batch_flops(share_of(model, alone))
    parallel = ParallelConfig(dp=1, tp=2, pp=2)
    config = EngineConfig(parallel=parallel, train_batch_tokens=64)
    parts = [cost.micro_batch_flops(share_of(model, config, rank)) for rank in range(4)]
    assert sum(part.total for part in parts) == pytest.approx(whole.total)


def test_model_flops_are_three_forwards_with_nothing_computed_twice() -> None:
    """What a step computes beyond them: the head's logits again, and half an attention forward (scores again)."""
    model = tiny_config()
    config = EngineConfig(parallel=ParallelConfig(dp=1), train_batch_tokens=100)
    flops = cost.micro_batch_flops(share_of(model, config))
    heads = 4.0 * model.num_attention_heads * model.head_dim * cost.keys_per_query(100, None) * 100
    again = 2.0 * model.vocab_size * model.hidden_size * 100 + 0.5 * heads * model.num_hidden_layers
    assert flops.total == pytest.approx(cost.model_flops(model, 100) * 100 + again)


def test_activation_checkpointing_computes_each_layer_once_more() -> None:
    model, parallel = tiny_config(vocab_size=16), ParallelConfig(dp=1, pp=2)
    configs = [
        EngineConfig(parallel=parallel, train_batch_tokens=64, activation_checkpointing=on) for on in (False, True)
    ]
    kept, again = (cost.micro_batch_flops(share_of(model, config)) for config in configs)
    assert again.total - kept.total == pytest.approx(kept.forward)


@pytest.mark.parametrize(("ranks", "seconds"), [
    ((0, 1, 2, 3), 3e9 / 100e9),  # one node
    ((0, 4, 8, 12), 3e9 / 10e9),  # four nodes
    ((2, 3, 4, 5), 2e9 / 10e9),  # across two: the slower of what goes at the same time
])  # fmt: skip
def test_send_takes_the_slower_of_near_and_far(ranks: tuple[int, ...], seconds: float) -> None:
    assert cost.send_seconds(3e9, ranks, 0, MACHINE) == pytest.approx(seconds)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "zero_bubble"])
@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 9), (3, 3), (4, 32), (4, 37), (6, 61)])
def test_idle_time_of_many_micro_batches_is_that_of_few(name: str, stages: int, micro_batches: int) -> None:
    """The whole list, simulated, takes as long as the counted part of it and the time of what was left out."""
    parallel = ParallelConfig(dp=1, pp=stages, schedule=name)
    costs = Costs(1.0, 1.25, 0.75, 0.0)
    plan = schedule(name, stages, micro_batches, parallel.chunks_per_stage)
    idle = cost.idle_time(parallel, costs, micro_batches)
    assert idle + 3.0 * micro_batches == pytest.approx(simulate(plan, costs).makespan)
    assert cost.bubble(parallel, costs, micro_batches) == pytest.approx(bubble_fraction(plan, costs))


def test_a_step_on_one_rank_is_its_flops_over_what_the_machine_achieves() -> None:
    model = tiny_config()
    config = EngineConfig(parallel=ParallelConfig(dp=1), train_batch_tokens=512)
    plan = make_plan(model, config, MACHINE, micro_batches=3)
    flops = cost.micro_batch_flops(share_of(model, config)).total
    assert plan.step is not None
    assert plan.step.total == plan.step.compute == pytest.approx(3 * flops / (100e12 * 0.4))
    assert plan.tokens_per_second == pytest.approx(3 * 512 / plan.step.total)


def test_parts_of_a_step_add_up_and_slower_links_cost_more() -> None:
    model = tiny_config(num_hidden_layers=4, vocab_size=512)
    config = EngineConfig(parallel=ParallelConfig(dp=2, pp=2, tp=2), train_batch_tokens=512)
    fast, slow = (
        make_plan(model, config, Machine(peak_tflops=1.0, intra_gbps=near, inter_gbps=5.0, ranks_per_node=4)).step
        for near in (100.0, 10.0)
    )
    assert fast is not None and slow is not None
    assert fast.exposed > 0 and fast.bubble > 0 and fast.weights > 0
    assert slow.exposed == pytest.approx(10 * fast.exposed)
    assert slow.compute == pytest.approx(fast.compute) and slow.total > fast.total


@pytest.mark.parametrize(("machine", "missing"), [
    (Machine(), ["peak_tflops", "intra_gbps"]),
    (Machine(peak_tflops=1.0), ["intra_gbps"]),
    (Machine(peak_tflops=1.0, intra_gbps=1.0, ranks_per_node=2), ["inter_gbps"]),
    (Machine(peak_tflops=1.0, inter_gbps=1.0, ranks_per_node=1), []),
], ids=["nothing", "bandwidth", "other nodes", "one rank a node"])  # fmt: skip
def test_no_time_without_the_figures_that_it_needs(machine: Machine, missing: list[str]) -> None:
    plan = make_plan(tiny_config(), EngineConfig(parallel=ParallelConfig(dp=2, tp=2)), machine)
    assert plan.missing == missing
    assert (plan.step is None) == bool(missing)
