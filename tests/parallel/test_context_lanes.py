"""Context lanes: how the tokens of a micro-batch are grouped in a sum is a setting, so context-parallel ranks change no
bit of a gradient."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import Engine, EngineConfig, ParallelConfig, Sample, SamplingParams
from engine.config import OptimizerConfig
from engine.errors import ConfigError, EngineError, InputError
from engine.kernels.weight import Weight
from engine.losses import LossBatch
from engine.parallel.context import deal_rows
from engine.parallel.mesh import Mesh
from tests.parallel.gradients import whole_gradients
from tests.parallel.pool import Pool
from tests.parallel.test_data import blocks_of
from tests.tiny import tiny_config

MODELS: dict[str, dict[str, Any]] = {
    "norms of q and k": {"architecture": "Qwen3ForCausalLM"},
    "biases everywhere, a tied head": {
        "architecture": "SeedOssForCausalLM",
        "attention_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
}
LENGTHS = (150, 9, 40, 21, 2, 15)


def samples(step: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(step)
    made = []
    for number, length in enumerate(LENGTHS):
        tokens = torch.randint(3, 40, (length,), generator=generator).tolist()  # each of them several times
        made.append(Sample(tokens=tokens, loss_mask=[0, *[1] * (length - 1)], advantages=1.0 - 0.4 * number))
    return made


def make(dtype: str, parallel: dict[str, Any], model: str = "norms of q and k", single: bool = False,
         **settings: Any) -> Engine:  # fmt: skip
    config = EngineConfig(
        dtype=dtype,
        kv_tokens=1024,
        max_batch_tokens=64,
        max_seqs=8,
        threads=1,
        parallel=ParallelConfig(**parallel),
        optimizer=OptimizerConfig(weight_decay=0.1),
        **{"train_batch_tokens": 200, **settings},
    )
    return Engine.from_config(
        tiny_config(**MODELS[model], initializer_range=0.2), config, seed=1, mesh=Mesh.single() if single else None
    )


def learn(*arguments: Any, steps: int = 10, **settings: Any) -> dict[str, Any]:
    """Optimizer steps: everything that they come to, in bits."""
    with blocks_of(1024):
        engine = make(*arguments, **settings)
        losses, norms = [], []
        gradients: list[Tensor] = []
        for step in range(steps):
            losses.append(engine.forward_backward(samples(step), "reinforce").loss)
            gradients = gradients or [g.clone() for g in whole_gradients(engine.trainer)]
            norms.append(engine.optim_step(1e-2).grad_norm)
        parts = engine.model.parts()
        found = {
            "losses": losses,
            "norms": norms,
            "gradients": {weight.name: g for weight, g in zip(engine.model.weights(), gradients, strict=True)},
            "weights": {p.name: p.weight.dense(p.row, p.shape[0]) for p in parts},
            "regions": {p.name: p.region for p in parts},
        }
        engine.close()
    return found


def assert_same_bits(ranks: list[dict[str, Any]], one: dict[str, Any], gradients: bool = True) -> None:
    for ours in ranks:
        assert ours["losses"] == one["losses"]
        assert ours["norms"] == one["norms"]
        if gradients:
            assert ours["gradients"].keys() == one["gradients"].keys()
            assert [n for n, g in ours["gradients"].items() if not torch.equal(g, one["gradients"][n])] == []
        other = [n for n, w in ours["weights"].items() if not torch.equal(w, one["weights"][n][ours["regions"][n]])]
        assert other == []


@functools.cache
def one_rank(dtype: str, lanes: int, model: str = "norms of q and k", steps: int = 10) -> dict[str, Any]:
    return learn(dtype, {"context_lanes": lanes}, model, single=True, steps=steps)


def test_the_long_sequence_is_cut_and_short_ones_are_not() -> None:
    """What the other tests stand on: in one micro-batch there are rows that travel and rows that stay."""
    for lanes in (2, 4):
        cut = deal_rows([length - 1 for length in LENGTHS if length != 40], lanes).cut
        assert any(cut) and not all(cut)


@pytest.mark.parametrize(("dtype", "steps"), [("float32", 10), ("bfloat16", 10), ("float64", 2)])
@pytest.mark.parametrize("model", MODELS)
def test_steps_of_two_ranks_have_the_bits_of_one(pool2: Pool, model: str, dtype: str, steps: int) -> None:
    ranks = pool2.run(learn, dtype, {"cp": 2}, model, steps=steps)  # a lane on each is the default
    assert_same_bits(ranks, one_rank(dtype, 2, model, steps))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ten_steps_of_one_two_and_four_ranks_have_the_same_bits(pool2: Pool, pool4: Pool, dtype: str) -> None:
    expected = one_rank(dtype, 4)
    assert_same_bits(pool2.run(learn, dtype, {"cp": 2, "context_lanes": 4}), expected)
    assert_same_bits(pool4.run(learn, dtype, {"cp": 4}), expected)
    assert expected["norms"] != one_rank(dtype, 2)["norms"]  # the setting is what decides


@pytest.mark.parametrize(
    ("axes", "settings"),
    [
        ({"dp": 2}, {"gradient_lanes": 4}),
        ({"pp": 2, "schedule": "zero_bubble"}, {"gradient_lanes": 2, "micro_batches": 2}),
    ],
    ids=str,
)
@pytest.mark.parametrize("ranks_of_cp", [1, 2])
def test_with_replicas_or_stages_too_bits_are_those_of_one_rank(
    pool2: Pool, pool4: Pool, axes: dict[str, Any], settings: dict[str, Any], ranks_of_cp: int
) -> None:
    parallel = {**axes, "cp": ranks_of_cp, "context_lanes": 2, **settings}
    one = learn("bfloat16", {"context_lanes": 2, **settings}, single=True, steps=4)
    pool = pool4 if ranks_of_cp == 2 else pool2
    assert_same_bits(pool.run(learn, "bfloat16", parallel, steps=4), one, gradients="pp" not in axes)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_with_tensor_parallel_ranks_bits_do_not_depend_on_cp(pool2: Pool, pool4: Pool, sequence_parallel: bool) -> None:
    parallel = {"tp": 2, "sequence_parallel": sequence_parallel, "context_lanes": 2}
    two = pool2.run(learn, "bfloat16", parallel, steps=4)
    four = pool4.run(learn, "bfloat16", {**parallel, "cp": 2}, steps=4)
    for rank, ours in enumerate(four):
        expected = two[rank % 2]  # neighbours are tensor-parallel
        assert ours["norms"] == expected["norms"]
        for name in ("gradients", "weights"):
            assert [n for n, g in ours[name].items() if not torch.equal(g, expected[name][n])] == []


def test_recomputed_activations_change_no_bit_of_a_lane(pool2: Pool) -> None:
    settings = {"activation_checkpointing": True, "train_batch_tokens": 100, "steps": 2}
    one = learn("bfloat16", {"context_lanes": 4}, single=True, steps=2, train_batch_tokens=100)
    assert_same_bits(pool2.run(learn, "bfloat16", {"cp": 2, "context_lanes": 4}, **settings), one)


def test_a_lane_without_rows_takes_part() -> None:
    short = [Sample(tokens=[5, 6, 7], loss_mask=[0, 1, 1])]
    engine, whole = (make("float64", {"context_lanes": lanes}, single=True) for lanes in (4, 1))
    assert engine.forward_backward(short, "sft").loss == pytest.approx(whole.forward_backward(short, "sft").loss)
    for ours, theirs in zip(whole_gradients(engine.trainer), whole_gradients(whole.trainer), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def sampled_and_trained(parallel: dict[str, Any], single: bool = False) -> tuple[list[list[int]], float | None]:
    engine = make("bfloat16", parallel, single=single)
    engine.forward_backward(samples(0), "reinforce")
    engine.optim_step(1e-2)
    prompts = [sample.tokens[:60] for sample in samples(1)]
    groups = engine.generate(prompts, SamplingParams(n=2, max_tokens=12, seed=4, ignore_eos=True))
    completions = [c for group in groups for c in group]
    made = [Sample.from_completion(c.prompt_token_ids, c, 1.0) for c in completions]
    difference = engine.forward_backward(made, "dapo").max_abs_logprob_difference
    engine.close()
    return [c.token_ids for c in completions], difference


def test_sampled_equals_trained_bitwise_in_lanes(pool2: Pool) -> None:
    tokens, difference = sampled_and_trained({"context_lanes": 4}, single=True)
    assert difference == 0.0
    assert pool2.run(sampled_and_trained, {"cp": 2, "context_lanes": 4}) == [(tokens, 0.0)] * 2


def test_an_error_half_way_leaves_no_lane_with_a_gradient() -> None:
    engine = make("float32", {"context_lanes": 2}, single=True)
    calls = []

    def fails_in_the_end(batch: LossBatch) -> Tensor:
        calls.append(len(batch.logprobs))
        if len(calls) == 2:
            raise ValueError("enough")
        return -batch.logprobs

    with pytest.raises(ValueError, match="enough"):
        engine.forward_backward(samples(0), fails_in_the_end)
    weights = engine.model.weights()
    assert all(weight.lane(number).grad is not None for weight in weights for number in (0, 1))
    assert not any(weight.lane(number).grad_buffer().any() for weight in weights for number in (0, 1))


# ---- the setting ----


def test_a_lane_of_a_weight_has_its_storage_and_a_gradient_of_its_own() -> None:
    weight = Weight("w", (20, 8), torch.float32, packed=True)
    second = weight.lane(1)
    assert weight.lane(0) is weight and weight.lane(1) is second and weight.lane(2) is not second
    assert second.data.data_ptr() == weight.data.data_ptr()
    weight.grad_buffer().fill_(1.0)
    second.grad_buffer().fill_(2.0)
    assert weight.grad_buffer().unique().tolist() == [1.0]
    weight.zero_grad()
    assert not weight.grad_buffer().any() and not second.grad_buffer().any()


def test_lanes_that_the_ranks_cannot_share_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"context_lanes is 3.* multiple of 2"):
        ParallelConfig(cp=2, context_lanes=3)
    with pytest.raises(ConfigError, match="context_lanes is -1; it must be at least 0"):
        ParallelConfig(context_lanes=-1)


def test_context_lanes_do_not_change_under_an_accumulated_gradient() -> None:
    trainer = make("float32", {}, single=True).trainer
    assert trainer.context_lanes == 1
    with pytest.raises(InputError, match="multiple of the 1"):
        trainer.context_lanes = 0
    trainer.forward_backward(samples(0), "sft")
    with pytest.raises(EngineError, match="step first"):
        trainer.context_lanes = 2
    trainer.optim_step(1e-3)
    trainer.context_lanes = 2
    assert trainer.context_lanes == 2


def save_half_way(directory: Path, parallel: dict[str, Any]) -> list[float]:
    """The losses of three steps, with a gradient accumulated before the state is saved after the first."""
    engine = make("bfloat16", parallel)
    engine.forward_backward(samples(0), "reinforce")
    engine.optim_step(1e-2)
    engine.forward_backward(samples(7), "reinforce")
    engine.save_state(directory)
    losses = go_on(engine)
    engine.close()
    return losses


def resume(directory: Path, parallel: dict[str, Any], single: bool = False) -> list[float]:
    engine = make("bfloat16", parallel, single=single)
    engine.load_state(directory)
    losses = go_on(engine)
    engine.close()
    return losses


def go_on(engine: Engine) -> list[float]:
    losses = []
    for step in (1, 2):
        losses.append(engine.forward_backward(samples(step), "reinforce").loss)
        losses.append(engine.optim_step(1e-2).grad_norm)
    return losses


def test_a_run_goes_on_with_its_lanes_on_fewer_ranks(tmp_path: Path, pool2: Pool, pool4: Pool) -> None:
    whole = pool4.run(save_half_way, tmp_path / "state", {"cp": 4})
    assert pool2.run(resume, tmp_path / "state", {"cp": 2}) == whole[:2]
    assert resume(tmp_path / "state", {}, single=True) == whole[0]
    assert resume(tmp_path / "state", {"context_lanes": 1}, single=True) != whole[0]  # the configuration is asked first
