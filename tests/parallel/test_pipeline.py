"""The pipeline's executor and the trainer on it, with real processes: the bits of one rank, whatever the schedule."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engine import Engine, EngineConfig, Sample
from engine.config import OptimizerConfig, ParallelConfig
from engine.errors import EngineError, NumericsError
from engine.kernels.linear import linear
from engine.kernels.op import cpu_missing
from engine.kernels.rms_norm import add_rms_norm
from engine.kernels.weight import Weight
from engine.losses import LossBatch
from engine.parallel.collectives import Group
from engine.parallel.pipeline import run_pipeline, sum_over_ends_
from engine.parallel.schedule import Schedule, forwards_only, schedule
from tests.parallel.pool import Pool
from tests.row_invariance import assert_same_bits
from tests.tiny import VOCAB_SIZE, tiny_config

if cpu_missing():
    pytest.skip(cpu_missing(), allow_module_level=True)

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble")
WIDTH = 48


# ---- the executor alone, on stages of one norm and one matrix ----


def make_stage(number: int) -> tuple[Weight, Weight]:
    generator = torch.Generator().manual_seed(number)
    norm, matrix = (
        Weight("n", (WIDTH,), torch.bfloat16, packed=False),
        Weight("w", (WIDTH, WIDTH), torch.bfloat16, True),
    )
    norm.load_(torch.rand(WIDTH, generator=generator) + 0.5)
    matrix.load_(torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5)
    return norm, matrix


def inputs(rows: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(n, WIDTH, generator=generator).bfloat16().requires_grad_() for n in rows]


def through(stage: tuple[Weight, Weight], x: Tensor) -> Tensor:
    norm, matrix = stage
    x, h = add_rms_norm(x, None, norm, 1e-5)
    return x + linear(h, matrix)


def gradients_of(stages: list[tuple[Weight, Weight]]) -> list[tuple[Tensor, Tensor]]:
    return [(norm.grad_buffer(), matrix.grad_buffer()) for norm, matrix in stages]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the ranks have: torch's own sums depend on the number of threads, and the loss of these stages is one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def on_one_rank(num_stages: int, rows: list[int]) -> tuple[list[float], list[tuple[Tensor, Tensor]]]:
    stages, losses = [make_stage(number) for number in range(num_stages)], []
    for x in inputs(rows):
        for stage in stages:
            x = through(stage, x)
        loss = x.float().square().sum()
        loss.backward()
        losses.append(float(loss.detach()))
    return losses, gradients_of(stages)


def on_this_rank(plan: Schedule, rows: list[int]) -> tuple[list[float], list[tuple[Tensor, Tensor]]]:
    """Losses (on the last rank) and gradients of this rank's chunks."""
    rank = dist.get_rank() if plan.num_stages > 1 else 0
    group = Group("pp", tuple(range(plan.num_stages)), rank, dist.group.WORLD if plan.num_stages > 1 else None)
    stages = [make_stage(plan.stage(rank, chunk)) for chunk in range(plan.num_chunks)]
    first, losses = inputs(rows), [0.0] * len(rows)

    def forward(number: int, chunk: int, stream: Tensor | None) -> Tensor:
        out = through(stages[chunk], first[number] if stream is None else stream)
        if plan.stage(rank, chunk) < plan.last_stage:
            return out
        loss = out.float().square().sum()
        losses[number] = float(loss.detach())
        return loss

    run_pipeline(plan, group, forward, [(n, WIDTH) for n in rows], torch.bfloat16)
    return losses, gradients_of(stages)


def assert_bits_of_one_rank(plan: Schedule, rows: list[int], results: list[Any]) -> None:
    losses, gradients = on_one_rank(plan.last_stage + 1, rows)
    assert results[-1][0] == losses
    for rank, (_, mine) in enumerate(results):
        for chunk, (norm, matrix) in enumerate(mine):
            stage = plan.stage(rank, chunk)
            assert_same_bits(norm, gradients[stage][0], f"norm of stage {stage}")
            assert_same_bits(matrix, gradients[stage][1], f"matrix of stage {stage}")


# 5 micro-batches, from one row to 3 MB: far more than a socket holds, so a send waits for its receive.
ROWS = [3, 32768, 1, 700, 64]


@pytest.mark.parametrize("name", SCHEDULES)
def test_two_ranks_run_every_schedule_with_the_bits_of_one(pool2: Pool, name: str) -> None:
    plan = schedule(name, 2, len(ROWS), 3 if name == "interleaved" else 1)
    assert_bits_of_one_rank(plan, ROWS, pool2.run(on_this_rank, plan, ROWS))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("count", [2, 9])
def test_four_ranks_run_every_schedule_with_the_bits_of_one(pool4: Pool, name: str, count: int) -> None:
    plan, rows = schedule(name, 4, count, 2 if name == "interleaved" else 1), (ROWS * 2)[:count]
    assert_bits_of_one_rank(plan, rows, pool4.run(on_this_rank, plan, rows))


@pytest.mark.parametrize("chunks", [1, 3])
def test_one_rank_hands_its_chunks_on_to_itself(chunks: int) -> None:
    plan = schedule("interleaved" if chunks > 1 else "zero_bubble", 1, 4, chunks)
    assert_bits_of_one_rank(plan, [3, 9, 1, 17], [on_this_rank(plan, [3, 9, 1, 17])])


def scored(plan: Schedule, rows: list[int]) -> tuple[list[float], bool]:
    losses, gradients = on_this_rank(forwards_only(plan), rows)
    return losses, any(bool(gradient.any()) for pair in gradients for gradient in pair)


def test_forwards_alone_leave_no_gradient(pool2: Pool) -> None:
    (_, first_learned), (losses, second_learned) = pool2.run(scored, schedule("interleaved", 2, 3, 2), [5, 40, 2])
    assert losses == on_one_rank(4, [5, 40, 2])[0]
    assert not first_learned and not second_learned


def sum_of_ends(size: int) -> Tensor:
    rank = dist.get_rank()
    x = torch.full((1000, 1000), 10.0**rank)
    if rank in (0, size - 1):
        sum_over_ends_(x, Group("pp", tuple(range(size)), rank, dist.group.WORLD))
    return x[:1, :1]


def test_both_ends_hold_the_sum_of_both(pool4: Pool) -> None:
    assert [float(x) for x in pool4.run(sum_of_ends, 4)] == [1001.0, 10.0, 100.0, 1001.0]


# ---- the trainer ----

MICRO_BATCHES = 5


def parallel(pp: int, name: str) -> ParallelConfig:
    return ParallelConfig(pp=pp, schedule=name, micro_batches=MICRO_BATCHES)


def engine_of(config: ParallelConfig, dtype: str = "float32", layers: int = 5, tied: bool = False) -> Engine:
    return Engine.from_config(
        tiny_config(num_hidden_layers=layers, initializer_range=0.1, tie_word_embeddings=tied),
        EngineConfig(dtype=dtype, parallel=config, optimizer=OptimizerConfig(max_grad_norm=0.0, weight_decay=0.1)),
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


def train(config: ParallelConfig, dtype: str, layers: int, steps: int) -> dict[str, Any]:
    """What training leaves behind: every tensor of the model this rank holds, and what each call said."""
    engine = engine_of(config, dtype, layers)
    said: list[Any] = []
    for step in range(steps):
        for half in range(2 if step == 1 else 1):
            stats = engine.forward_backward(samples_of(2 * step + half), "grpo")
            said.append((stats.loss, stats.metrics, stats.max_abs_logprob_difference, stats.logprobs))
        engine.optim_step(1e-3)
    scores = engine.score([sample.tokens for sample in samples_of(99)], temperature=0.7)
    weights = {
        f"{part.name} {part.weight.name}": part.weight.dense(part.row, part.shape[0]) for part in engine.model.parts()
    }
    engine.close()
    return {"weights": weights, "said": said, "scores": scores}


def assert_alike(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    names: set[str] = set()
    for rank, result in enumerate(found):
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
def alone(dtype: str, layers: int, steps: int) -> dict[str, Any]:
    return train(parallel(1, "1f1b"), dtype, layers, steps)


@pytest.mark.parametrize(("dtype", "steps"), [("float32", 10), ("bfloat16", 3)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_steps_on_two_ranks_equal_one_rank_bitwise(pool2: Pool, name: str, dtype: str, steps: int) -> None:
    assert_alike(pool2.run(train, parallel(2, name), dtype, 5, steps), alone(dtype, 5, steps))


@pytest.mark.parametrize(("dtype", "steps"), [("float32", 2), ("bfloat16", 10)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_steps_on_four_ranks_equal_one_rank_bitwise(pool4: Pool, name: str, dtype: str, steps: int) -> None:
    assert_alike(pool4.run(train, parallel(4, name), dtype, 9, steps), alone(dtype, 9, steps))


def tied_ends(config: ParallelConfig) -> Tensor | None:
    engine = engine_of(config, tied=True)
    for step in range(3):
        engine.forward_backward(samples_of(step), "sft")
        engine.forward_backward(samples_of(10 + step), "sft")
        engine.optim_step(1e-3)
    model = engine.model
    return model.embed.dense() if model.has_first else model.head.dense() if model.has_last else None


def test_tied_embedding_and_head_stay_one_weight(pool4: Pool) -> None:
    first, *between, last = pool4.run(tied_ends, parallel(4, "1f1b"))
    assert between == [None, None]
    assert_same_bits(first, last, "the tied weight on the first and the last stage")
    one_rank = tied_ends(parallel(1, "1f1b"))
    assert float((first - one_rank).abs().max()) < 1e-5  # added up in another order: embedding, then head


# ---- failures of a loss ----


class PoorLoss(Exception):
    """Of somebody else's: it does not travel."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def not_finite(batch: LossBatch) -> Tensor:
    return batch.logprobs * float("inf")


def poor(batch: LossBatch) -> Tensor:
    raise PoorLoss(1, 2)


def failure_and_what_is_left(loss: Callable[[LossBatch], Tensor]) -> tuple[str, str, bool, bool]:
    engine = engine_of(parallel(2, "1f1b"))
    engine.forward_backward(samples_of(0), "sft")
    try:
        engine.forward_backward(samples_of(1), loss)
    except Exception as error:
        kind, text = type(error).__name__, str(error)
    left = any(bool(weight.grad_buffer().any()) for weight in engine.model.weights())
    engine.forward_backward(samples_of(0), "sft")  # the pipeline is empty again, and goes on
    engine.optim_step(1e-3)
    return kind, text, left, isinstance(engine.weight_version, int)


def test_loss_that_is_not_finite_is_raised_on_every_stage(pool2: Pool) -> None:
    first, second = pool2.run(failure_and_what_is_left, not_finite)
    assert first == second
    assert first[0] == NumericsError.__name__ and "gradients were dropped" in first[1]
    assert not first[2]


def test_error_in_a_loss_of_ones_own_reaches_every_stage(pool2: Pool) -> None:
    first, second = pool2.run(failure_and_what_is_left, poor)
    assert first[:2] == (EngineError.__name__, "the loss raised PoorLoss on the last pipeline stage: 1 and 2")
    assert second[:2] == ("PoorLoss", "1 and 2")
    assert not first[2] and not second[2]
