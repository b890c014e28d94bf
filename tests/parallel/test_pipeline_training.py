"""Training and scoring in a pipeline, with real processes: the bits of one rank, whatever the schedule."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import Engine, EngineConfig, Sample
from engine.config import OptimizerConfig, ParallelConfig
from engine.errors import NumericsError, ParallelError
from engine.kernels.op import cpu_missing
from engine.losses import LossBatch
from tests.parallel.pool import Pool
from tests.row_invariance import assert_same_bits
from tests.tiny import VOCAB_SIZE, tiny_config

if cpu_missing():
    pytest.skip(cpu_missing(), allow_module_level=True)

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble")
MICRO_BATCHES = 5


def parallel(pp: int, name: str, **other: int) -> ParallelConfig:
    return ParallelConfig(**{"pp": pp, "schedule": name, "micro_batches": MICRO_BATCHES, **other})  # type: ignore[arg-type]


def engine_of(config: ParallelConfig, dtype: str = "float32", layers: int = 5, tied: bool = False) -> Engine:
    return Engine.from_config(
        tiny_config(num_hidden_layers=layers, initializer_range=0.1, tie_word_embeddings=tied),
        EngineConfig(dtype=dtype, parallel=config, optimizer=OptimizerConfig(max_grad_norm=0.5, weight_decay=0.1)),
        seed=3,
    )


def samples_of(seed: int, count: int = 11) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        length = int(torch.randint(2, 60, (), generator=generator))
        tokens = torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()
        mask = torch.zeros(length, dtype=torch.int64)
        mask[1 + length // 3 :] = 1
        old = -torch.rand(length, generator=generator) * 4
        samples.append(Sample(tokens, mask, torch.randn(length, generator=generator), old_logprobs=old))
    return samples


def train(config: ParallelConfig, dtype: str, layers: int, steps: int, tied: bool = False) -> dict[str, Any]:
    """What training leaves behind: every tensor of the model this rank holds, and what each call said."""
    engine = engine_of(config, dtype, layers, tied)
    said: list[Any] = []
    norms: list[float] = []
    for step in range(steps):
        for half in range(2 if step == 1 else 1):
            stats = engine.forward_backward(samples_of(2 * step + half), "grpo")
            said.append((stats.loss, stats.metrics, stats.max_abs_logprob_difference, stats.logprobs))
        norms.append(engine.optim_step(1e-3).grad_norm)
    scores = engine.score([sample.tokens for sample in samples_of(99)], temperature=0.7)
    weights = {part.name: part.weight.dense(part.row, part.shape[0]) for part in engine.model.parts()}
    engine.close()
    return {"weights": weights, "said": said, "norms": norms, "scores": scores}


def assert_alike(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    names: set[str] = set()
    for rank, result in enumerate(found):
        assert result["norms"] == expected["norms"], f"norms of the gradient on rank {rank}"
        names |= result["weights"].keys()
        for name, value in result["weights"].items():
            assert_same_bits(value, expected["weights"][name], f"{name} on rank {rank}")
        for call, (one, other) in enumerate(zip(result["said"], expected["said"], strict=True)):
            assert one[:3] == other[:3], f"call {call} on rank {rank}"
            for mine, theirs in zip(one[3], other[3], strict=True):
                assert_same_bits(mine.nan_to_num(9.0), theirs.nan_to_num(9.0), f"log-probabilities on rank {rank}")
        for mine, theirs in zip(result["scores"], expected["scores"], strict=True):
            assert_same_bits(mine, theirs, f"scores on rank {rank}")
    assert names == expected["weights"].keys()


@functools.cache
def alone(dtype: str, layers: int, steps: int, tied: bool = False) -> dict[str, Any]:
    return train(parallel(1, "1f1b"), dtype, layers, steps, tied)


@pytest.mark.parametrize(("dtype", "steps"), [("float32", 10), ("bfloat16", 3)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_steps_on_two_ranks_equal_one_rank_bitwise(pool2: Pool, name: str, dtype: str, steps: int) -> None:
    assert_alike(pool2.run(train, parallel(2, name), dtype, 5, steps), alone(dtype, 5, steps))


@pytest.mark.parametrize(("dtype", "steps"), [("float32", 2), ("bfloat16", 10)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_steps_on_four_ranks_equal_one_rank_bitwise(pool4: Pool, name: str, dtype: str, steps: int) -> None:
    assert_alike(pool4.run(train, parallel(4, name), dtype, 9, steps), alone(dtype, 9, steps))


@pytest.mark.parametrize(("axis", "name"), [("tp", "zero_bubble"), ("cp", "1f1b"), ("dp", "interleaved")])
def test_a_pipeline_beside_another_axis_changes_no_bit(pool2: Pool, pool4: Pool, axis: str, name: str) -> None:
    """2 x 2 ranks against two: each rank holds what the rank at its place of the other axis holds without stages."""
    without = pool2.run(train, parallel(1, "1f1b", **{axis: 2}), "bfloat16", 4, 3)
    found = pool4.run(train, parallel(2, name, **{axis: 2}), "bfloat16", 4, 3)
    for place in range(2):
        assert_alike(found[2 * place : 2 * place + 2] if axis == "dp" else found[place::2], without[place])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_of_a_tied_model_equal_one_rank_bitwise(pool4: Pool, dtype: str, name: str) -> None:
    """Where the first stage sums the embedding's gradient and the last one the head's, and each steps its copy."""
    found = pool4.run(train, parallel(4, name), dtype, 9, 2, tied=True)
    assert ["model.embed_tokens.weight" in result["weights"] for result in found] == [True, False, False, True]
    assert_alike(found, alone(dtype, 9, 2, tied=True))


# ---- failures of a loss ----


class PoorLoss(Exception):
    """Of somebody else's: it does not travel."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def not_finite(batch: LossBatch) -> Tensor:
    return batch.logprobs * float("inf")


def poor(batch: LossBatch) -> Tensor:
    raise PoorLoss(1, 2)


def failure_and_what_is_left(loss: Callable[[LossBatch], Tensor]) -> tuple[str, str, bool, float]:
    engine = engine_of(parallel(2, "1f1b"))
    engine.forward_backward(samples_of(0), "sft")
    try:
        engine.forward_backward(samples_of(1), loss)
    except Exception as error:
        kind, text = type(error).__name__, str(error)
    left = any(bool(weight.grad_buffer().any()) for weight in engine.model.weights())
    engine.forward_backward(samples_of(0), "sft")  # the pipeline is empty again, and goes on
    return kind, text, left, engine.optim_step(1e-3).grad_norm


def test_loss_that_is_not_finite_is_raised_on_every_stage(pool2: Pool) -> None:
    first, second = pool2.run(failure_and_what_is_left, not_finite)
    assert first[0] == second[0] == NumericsError.__name__
    assert first[1] == f"{second[1]} (on the last pipeline stage)" and "gradients were dropped" in second[1]
    assert not first[2] and not second[2]
    engine = engine_of(parallel(1, "1f1b"))
    engine.forward_backward(samples_of(0), "sft")
    assert first[3] == second[3] == engine.optim_step(1e-3).grad_norm


def test_error_in_a_loss_of_ones_own_reaches_every_stage(pool2: Pool) -> None:
    first, second = pool2.run(failure_and_what_is_left, poor)
    assert first[0] == ParallelError.__name__
    assert first[1].startswith("PoorLoss on the last pipeline stage (1 and 2); gradients were dropped")
    assert second[:2] == ("PoorLoss", "1 and 2")
    assert not first[2] and not second[2]
