"""Data parallelism: lanes decide the bits of a gradient, ranks decide who computes them, and nobody waits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine.config import EngineConfig, OptimizerConfig, ParallelConfig
from engine.errors import EngineError, InputError, NumericsError, ParallelError
from engine.losses import LossBatch
from engine.model import Transformer
from engine.parallel import data, ownership
from engine.parallel.collectives import Group
from engine.parallel.mesh import Mesh, make_mesh
from engine.parallel.shards import Placement
from engine.trainer import Trainer
from engine.types import Sample
from tests.engine.test_trainer import make_samples, with_old_logprobs
from tests.parallel.pool import Pool
from tests.tiny import tiny_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@contextmanager
def blocks_of(elements: int) -> Iterator[None]:
    """Row blocks so small that tiny weights are split among ranks."""
    before = ownership.BLOCK_ELEMENTS
    ownership.BLOCK_ELEMENTS = elements
    try:
        yield
    finally:
        ownership.BLOCK_ELEMENTS = before


def first_ranks(count: int) -> Mesh | None:
    """A mesh of data-parallel replicas on the first ranks of the pool; the others have no part in it."""
    handle = dist.new_group(list(range(count)))
    rank = dist.get_rank()
    if rank >= count:
        return None
    group = {name: Group(name, tuple(range(count)), rank, handle) for name in ("dp", "data", "world")}
    return replace(Mesh.single(), **group)


def make_trainer(mesh: Mesh, dtype: str = "float32", tied: bool = False, **config: Any) -> Trainer:
    parallel = config.pop("parallel", ParallelConfig())
    placement = Placement(mesh, parallel.chunks_per_stage, parallel.sequence_parallel and mesh.tp.size > 1)
    model = Transformer(tiny_config("Qwen3ForCausalLM", tie_word_embeddings=tied), DTYPES[dtype], placement)
    model.initialize(0)
    config = {"train_batch_tokens": 64, "optimizer": OptimizerConfig(weight_decay=0.1)} | config
    return Trainer(model, EngineConfig(dtype=dtype, parallel=parallel, **config))


def learn(trainer: Trainer, steps: int = 10, calls: int = 2) -> dict[str, Any]:
    """A few steps, of several calls each; all that can be seen of them."""
    seen: dict[str, Any] = {"losses": [], "metrics": [], "logprobs": [], "differences": [], "norms": []}
    for step in range(steps):
        for call in range(calls):
            samples = make_samples(count=7, seed=10 * step + call)
            with_old_logprobs(trainer, samples, shift=0.01)
            stats = trainer.forward_backward(samples, "dapo")
            seen["losses"].append(stats.loss)
            seen["metrics"].append(stats.metrics)
            seen["logprobs"] += stats.logprobs
            seen["differences"].append(stats.max_abs_logprob_difference)
        seen["norms"].append(trainer.optim_step(1e-2).grad_norm)
    seen["scored"] = trainer.score([[5, 6, 7], [9], [4] * 30, [8] * 9])
    seen["weights"] = {weight.name: weight.data.clone() for weight in trainer.model.weights()}
    seen["state_bytes"] = sum(
        tensor.nbytes for m in trainer.optimizer.state.values() for tensor in (m.master, m.exp_avg, m.exp_avg_sq)
    )
    return seen


def assert_same(left: dict[str, Any], right: dict[str, Any]) -> None:
    """Bit for bit, but for who holds the optimizer's state."""
    for name in ("losses", "metrics", "differences", "norms"):
        assert left[name] == right[name], name
    for name in ("logprobs", "scored"):
        assert all(
            torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(left[name], right[name], strict=True)
        ), name
    assert left["weights"].keys() == right["weights"].keys()
    assert [name for name in left["weights"] if not torch.equal(left["weights"][name], right["weights"][name])] == []


def learn_on(count: int, lanes: int, dtype: str, block: int = 1024, **config: Any) -> dict[str, Any] | None:
    """On the first `count` ranks."""
    mesh = first_ranks(count)
    if mesh is None:
        return None
    with blocks_of(block):
        return learn(make_trainer(mesh, dtype, parallel=ParallelConfig(gradient_lanes=lanes), **config))


def alone(lanes: int, dtype: str = "float32", block: int = 1024, **config: Any) -> dict[str, Any]:
    with blocks_of(block):
        return learn(make_trainer(Mesh.single(), dtype, parallel=ParallelConfig(gradient_lanes=lanes), **config))


# ---- bits ----


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_ranks_equal_one_with_two_lanes_bitwise(pool2: Pool, dtype: str, tied: bool) -> None:
    expected = alone(2, dtype, tied=tied)
    for result in pool2.run(learn_on, 2, 2, dtype, tied=tied):
        assert_same(result, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_four_lanes_have_the_same_bits_on_any_number_of_ranks(pool4: Pool, dtype: str) -> None:
    expected = alone(4, dtype)
    for count in (2, 3, 4):
        results = pool4.run(learn_on, count, 4, dtype)
        for result in results[:count]:
            assert_same(result, expected)


def test_ranks_without_a_lane_have_the_same_bits_too(pool4: Pool) -> None:
    expected = alone(2)
    for result in pool4.run(learn_on, 4, 2, "float32"):
        assert_same(result, expected)


def test_lanes_without_samples_have_the_same_bits_too(pool4: Pool) -> None:
    """Seven samples in nine lanes."""
    expected = alone(9)
    for result in pool4.run(learn_on, 4, 9, "float32"):
        assert_same(result, expected)


def test_activation_checkpointing_changes_no_bit(pool2: Pool) -> None:
    expected = alone(2)
    for result in pool2.run(learn_on, 2, 2, "float32", activation_checkpointing=True):
        assert_same(result, expected)


def test_the_size_of_blocks_changes_the_norm_alone() -> None:
    """What one rank computes of a block is what it computes of the weight: only partial sums of the norm differ."""
    no_clipping = OptimizerConfig(max_grad_norm=0.0)
    small, big = alone(1, optimizer=no_clipping), alone(1, block=1 << 20, optimizer=no_clipping)
    assert small["norms"] == pytest.approx(big["norms"], rel=1e-12)
    assert_same({**small, "norms": big["norms"]}, big)


def test_lanes_decide_the_bits() -> None:
    """Or the tests above would hold for any way of dealing."""
    assert alone(1)["norms"] != alone(2)["norms"]


def test_lanes_regroup_a_sum_and_no_more() -> None:
    one, four = (gradient_of(make_trainer(Mesh.single(), "float64", parallel=ParallelConfig(gradient_lanes=lanes)))
                 for lanes in (1, 4))  # fmt: skip
    assert one.keys() == four.keys()
    for name in one:
        torch.testing.assert_close(one[name], four[name], rtol=1e-10, atol=1e-14)


def gradient_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    trainer.forward_backward(make_samples(), "sft")
    return {weight.name: weight.grad_buffer().clone() for weight in trainer.optimizer.weights}


def learn_with_tensor_parallel(config: ParallelConfig) -> dict[str, Any]:
    with blocks_of(1024):
        trainer = make_trainer(make_mesh(config), "float64", parallel=config)
        seen = learn(trainer, steps=3)
        seen["dense"] = {
            (part.name, part.origin): part.weight.dense(part.row, part.shape[0]) for part in trainer.model.parts()
        }
        seen["regions"] = {(part.name, part.origin): part.region for part in trainer.model.parts()}
        return seen


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("dp", [1, 2])
def test_tensor_and_data_parallel_equal_one_rank_in_float64(pool4: Pool, dp: int, sequence_parallel: bool) -> None:
    """Two calls a step: what ranks hold alike (norms, and key/value heads where tp is 4) must not count twice."""
    trainer = make_trainer(Mesh.single(), "float64", parallel=ParallelConfig(gradient_lanes=dp))
    expected = learn(trainer, steps=3)
    whole = {part.name: part.weight.dense(part.row, part.shape[0]) for part in trainer.model.parts()}
    config = ParallelConfig(dp=dp, tp=4 // dp, sequence_parallel=sequence_parallel)
    for result in pool4.run(learn_with_tensor_parallel, config):
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-10)
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-10)
        for a, b in zip(result["logprobs"], expected["logprobs"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, equal_nan=True)
        for key, value in result["dense"].items():
            torch.testing.assert_close(value, whole[key[0]][result["regions"][key]], rtol=1e-8, atol=1e-10)


def learn_with_context_parallel(config: ParallelConfig) -> dict[str, Any]:
    with blocks_of(1024):
        return learn(make_trainer(make_mesh(config), "float64", parallel=config), steps=3)


def test_context_and_data_parallel_equal_one_rank_in_float64(pool4: Pool) -> None:
    expected = learn(make_trainer(Mesh.single(), "float64", parallel=ParallelConfig(gradient_lanes=2)), steps=3)
    results = pool4.run(learn_with_context_parallel, ParallelConfig(dp=2, cp=2))
    for result in results:
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-10)
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-10)
        for name, weight in result["weights"].items():
            torch.testing.assert_close(weight, expected["weights"][name], rtol=1e-8, atol=1e-10)
            assert torch.equal(weight, results[0]["weights"][name])


# ---- shares ----


def test_each_rank_keeps_its_share_of_the_optimizer_state(pool4: Pool) -> None:
    whole = alone(1)["state_bytes"]
    shares = [result["state_bytes"] for result in pool4.run(learn_on, 4, 4, "float32")]
    assert sum(shares) == whole
    assert max(shares) <= whole / 4 + 3 * 4 * 1024 * 2  # two blocks


# ---- overlap ----


def order_of_events(checkpointing: bool) -> list[str]:
    events: list[str] = []
    trainer = make_trainer(make_mesh(ParallelConfig()), activation_checkpointing=checkpointing)
    passed, send = trainer.model.backward_passed, data.start_all_to_all
    assert passed is not None

    def watched(bucket: int) -> None:
        events.append(f"backward {bucket}")
        passed(bucket)

    def sent(*arguments: Any) -> Any:
        events.append("send")
        return send(*arguments)

    trainer.model.backward_passed, data.start_all_to_all = watched, sent
    try:
        trainer.forward_backward(make_samples(), "sft")
    finally:
        data.start_all_to_all = send
    return events


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_bucket_is_sent_before_the_next_layers_backward(pool2: Pool, checkpointing: bool) -> None:
    """Head, layer 1, layer 0, embedding: in the last micro-batch each goes out as soon as it is complete."""
    for events in pool2.run(order_of_events, checkpointing):
        earlier = ["backward 0", "backward 1", "backward 2"] * ((len(events) - 7) // 3)
        last = ["backward 0", "send", "backward 1", "send", "backward 2", "send", "send"]
        assert len(earlier) > 0
        assert events == earlier + last


def test_one_rank_with_one_lane_has_no_copy_of_a_gradient() -> None:
    trainer = make_trainer(Mesh.single())
    trainer.forward_backward(make_samples(), "sft")
    assert trainer.model.backward_passed is None
    whole = {weight.name: weight.grad_buffer() for weight in trainer.model.weights()}
    for weight in trainer.optimizer.weights:
        assert weight.grad_buffer().untyped_storage().data_ptr() in {
            g.untyped_storage().data_ptr() for g in whole.values()
        }


# ---- failures ----


def a_loss_that_fails_on_rank(rank: int, kind: str) -> tuple[str, str, float]:
    """What this rank raises, and the norm of the step after it."""
    trainer = make_trainer(make_mesh(ParallelConfig()))
    trainer.forward_backward(make_samples(seed=1), "sft")

    def loss(batch: LossBatch) -> torch.Tensor:
        if dist.get_rank() == rank and kind == "nan":
            return batch.logprobs * math.nan
        if dist.get_rank() == rank:
            raise ZeroDivisionError("my own mistake")
        return -batch.logprobs

    raised = ("", "")
    try:
        trainer.forward_backward(make_samples(), loss)
    except Exception as error:
        raised = (type(error).__name__, str(error))
    trainer.forward_backward(make_samples(), "sft")
    return (*raised, trainer.optim_step(1e-3).grad_norm)


def test_a_loss_that_is_not_finite_on_one_rank_is_an_error_on_all(pool2: Pool) -> None:
    here, there = pool2.run(a_loss_that_fails_on_rank, 0, "nan")
    assert here[0] == there[0] == NumericsError.__name__
    assert "replica 0" in there[1]
    trainer = make_trainer(Mesh.single(), parallel=ParallelConfig(gradient_lanes=2))
    trainer.forward_backward(make_samples(), "sft")
    assert here[2] == there[2] == trainer.optim_step(1e-3).grad_norm  # nothing was left behind


def test_a_mistake_in_a_loss_on_one_rank_is_an_error_on_all(pool2: Pool) -> None:
    there, here = pool2.run(a_loss_that_fails_on_rank, 1, "mistake")
    assert here[:2] == ("ZeroDivisionError", "my own mistake")
    assert there[0] == ParallelError.__name__
    assert "replica 1" in there[1] and "my own mistake" in there[1]
    assert here[2] == there[2] > 0


def a_gradient_that_is_not_finite() -> tuple[str, int]:
    trainer = make_trainer(make_mesh(ParallelConfig()))
    trainer.forward_backward(make_samples(), "sft")
    if dist.get_rank() == 1:
        trainer.optimizer.weights[0].grad_buffer().view(-1)[0] = math.inf
    with pytest.raises(NumericsError) as caught:
        trainer.optim_step(1e-3)
    return str(caught.value), trainer.optimizer.steps


def test_a_gradient_that_is_not_finite_on_one_rank_stops_the_step_on_all(pool2: Pool) -> None:
    (first, steps), second = pool2.run(a_gradient_that_is_not_finite)
    assert (first, steps) == second and steps == 0
    assert "1 of " in first


# ---- lanes as a setting ----


def test_lanes_do_not_change_under_an_accumulated_gradient() -> None:
    trainer = make_trainer(Mesh.single())
    with pytest.raises(InputError, match="at least 1"):
        trainer.gradient_lanes = 0
    trainer.forward_backward(make_samples(), "sft")
    with pytest.raises(EngineError, match="step first"):
        trainer.gradient_lanes = 4
    trainer.optim_step(1e-3)
    trainer.gradient_lanes = 4
    assert trainer.gradient_lanes == 4


def test_lanes_set_later_have_the_bits_of_lanes_set_first() -> None:
    with blocks_of(1024):
        trainer = make_trainer(Mesh.single())
        trainer.gradient_lanes = 4
        later = learn(trainer, steps=3)
        trainer = make_trainer(Mesh.single(), parallel=ParallelConfig(gradient_lanes=4))
        assert_same(later, learn(trainer, steps=3))


def test_every_lane_has_the_micro_batches_it_was_promised() -> None:
    trainer = make_trainer(
        Mesh.single(), train_batch_tokens=8192, parallel=ParallelConfig(gradient_lanes=2, micro_batches=3)
    )
    stats = trainer.forward_backward(make_samples(count=12), "sft")
    assert stats.metrics["micro_batches"] >= 6
    few: list[Sample] = make_samples(count=3)
    assert trainer.forward_backward(few, "sft").metrics["micro_batches"] == 3


# ---- an embedding on two stages ----


def tied_gradients() -> list[bool]:
    """Whether the two copies of a tied embedding hold the sum of their gradients after each of two calls."""
    mesh = make_mesh(ParallelConfig(pp=2, dp=dist.get_world_size() // 2))
    model = Transformer(tiny_config(tie_word_embeddings=True), torch.float32, Placement(mesh))
    with blocks_of(1024):
        trainer = Trainer(model, EngineConfig(dtype="float32"))
    (weight,), reducer = model.tied_weights, trainer.reducer
    generator = torch.Generator().manual_seed(0)
    expected = torch.zeros(weight.shape)
    right = []
    for _ in range(2):
        reducer.begin()
        reducer.begin_lane(1, [True] * mesh.dp.size)
        # [replica, stage, ...]: every rank draws them all; small whole numbers, so that any order gives the same sum
        made = torch.randint(-9, 9, (mesh.dp.size, 2, *weight.shape), generator=generator).float()
        weight.grad_buffer().add_(made[mesh.dp.index, mesh.pp.index])
        reducer.finish_lane()
        reducer.finish()
        expected += made.sum((0, 1))
        bucket = next(b for b in reducer.shares.buckets if b.blocks[0].weight is weight)
        mine = [b for b, owner in zip(bucket.blocks, bucket.owners, strict=True) if owner == mesh.data.index]
        right += [
            torch.equal(own.grad_buffer(), expected[block.row : block.row + block.rows])
            for block, own in zip(mine, bucket.own, strict=True)
        ]
    mesh.close()
    return right


@pytest.mark.parametrize("size", [2, 4])
def test_two_copies_of_a_tied_embedding_have_one_gradient(pool2: Pool, pool4: Pool, size: int) -> None:
    for right in (pool2 if size == 2 else pool4).run(tied_gradients):
        assert all(right) and len(right) >= 2
