"""Whatever the mesh, it is the same model that is sampled and trained: ten optimizer steps on every mesh against one
rank, one of them after two calls of `forward_backward`. Where nothing but the owner of a sum changes (pp, dp), to the
bit; else in float64, to 1e-10."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import Engine, EngineConfig, Sample, SamplingParams
from engine.config import ParallelConfig
from engine.parallel.mesh import Mesh
from tests.parallel.pool import Pool
from tests.tiny import tiny_config

STEPS = 10
LANES = 2  # of every run, so that sums are grouped alike
TWO = {"tp": {"tp": 2}, "pp": {"pp": 2}, "dp": {"dp": 2}, "cp": {"cp": 2}}
FOUR = {
    "tp x pp": {"tp": 2, "pp": 2},
    "tp x dp": {"tp": 2, "dp": 2},
    "pp x dp": {"pp": 2, "dp": 2},
    "cp x tp": {"cp": 2, "tp": 2},
    "cp x dp": {"cp": 2, "dp": 2},
}
BITWISE = ("pp", "dp", "pp x dp")


@dataclass
class Outcome:
    """What a run leaves: everything that is whole on every rank, and the weights' regions of this one."""

    before: list[Tensor]  # scores before the first step
    losses: list[float]
    norms: list[float]
    first_logprobs: list[Tensor]  # seen by the first gradient step
    after: list[Tensor]  # scores after the last step
    weights: dict[str, tuple[tuple[slice, ...], Tensor]]


def samples(step: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(step)
    made = []
    for number, length in enumerate((37, 9, 64, 21, 15, 50)):
        tokens = torch.randint(3, 300, (length,), generator=generator).tolist()
        made.append(Sample(tokens=tokens, loss_mask=[0, 0, *[1] * (length - 2)], advantages=1.0 - 0.4 * number))
    return made


def make(dtype: str, axes: dict[str, int] | None, tied: bool = False, **parallel: Any) -> Engine:
    config = EngineConfig(
        dtype=dtype,
        kv_tokens=1024,
        max_batch_tokens=64,
        max_seqs=8,
        train_batch_tokens=128,
        threads=1,
        parallel=ParallelConfig(**(axes or {}), gradient_lanes=LANES, micro_batches=2, **parallel),
    )
    model = tiny_config("Qwen3ForCausalLM", initializer_range=0.2, tie_word_embeddings=tied)
    return Engine.from_config(model, config, mesh=Mesh.single() if axes is None else None)


def train(dtype: str, axes: dict[str, int] | None, tied: bool = False, **parallel: Any) -> Outcome:
    engine = make(dtype, axes, tied, **parallel)
    probes = [sample.tokens for sample in samples(99)]
    before = engine.score(probes)
    losses, norms = [], []
    first: list[Tensor] = []
    for step in range(STEPS):
        for call in range(2 if step == 4 else 1):
            stats = engine.forward_backward(samples(step + 20 * call), "reinforce")
            losses.append(stats.loss)
            first = first or stats.logprobs
        norms.append(engine.optim_step(1e-2).grad_norm)
    weights = {
        part.name: (part.region, part.weight.dense(part.row, part.shape[0], torch.float64))
        for part in engine.model.parts()
    }
    outcome = Outcome(before, losses, norms, first, engine.score(probes), weights)
    engine.close()
    return outcome


def sample_after_steps(dtype: str, axes: dict[str, int], **parallel: Any) -> tuple[list[list[int]], float]:
    """Tokens sampled after three steps, and the largest difference between what they were sampled and trained at."""
    engine = make(dtype, axes, **parallel)
    for step in range(3):
        engine.forward_backward(samples(step), "reinforce")
        engine.optim_step(1e-2)
    prompts = [sample.tokens[:20] for sample in samples(50)]
    groups = engine.generate(prompts, SamplingParams(n=2, max_tokens=16, seed=4, ignore_eos=True))
    trained = engine.forward_backward(
        [Sample.from_completion(prompts[p], c, 1.0) for p, group in enumerate(groups) for c in group], "dapo"
    )
    completions = [c for group in groups for c in group]
    worst = 0.0
    for completion, logprobs in zip(completions, trained.logprobs, strict=True):
        worst = max(worst, float((logprobs[-len(completion.token_ids) :] - completion.logprobs).abs().max()))
    engine.close()
    return [c.token_ids for c in completions], worst


@functools.cache
def one_rank(dtype: str, tied: bool = False) -> Outcome:
    return train(dtype, None, tied)


def assert_same_bits(outcome: Outcome, expected: Outcome) -> None:
    assert outcome.losses == expected.losses
    assert outcome.norms == expected.norms
    for name in ("before", "after"):
        for a, b in zip(getattr(outcome, name), getattr(expected, name), strict=True):
            assert torch.equal(a, b), name
    for name, (region, value) in outcome.weights.items():
        assert torch.equal(value, expected.weights[name][1][region]), name


def assert_close(outcome: Outcome, expected: Outcome, tolerance: float) -> None:
    for name in ("losses", "norms"):
        a, b = (torch.tensor(getattr(o, name), dtype=torch.float64) for o in (outcome, expected))
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance), name
    for name, (region, value) in outcome.weights.items():
        worst = float((value - expected.weights[name][1][region]).abs().max())
        assert worst < tolerance, (name, worst)


def meshes(*names: str) -> list[Any]:
    every = {name: (2, axes) for name, axes in TWO.items()} | {name: (4, axes) for name, axes in FOUR.items()}
    return [pytest.param(*every[name], id=name) for name in names or every]


@pytest.fixture
def pool(request: pytest.FixtureRequest) -> Any:
    return lambda size: request.getfixturevalue(f"pool{size}")


@pytest.mark.parametrize(("size", "axes"), meshes())
def test_ten_steps_in_float64_are_those_of_one_rank(pool: Any, size: int, axes: dict[str, int]) -> None:
    for outcome in pool(size).run(train, "float64", axes):
        assert_close(outcome, one_rank("float64"), 1e-10)


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("size", "axes"), meshes(*BITWISE))
def test_ten_steps_have_the_bits_of_one_rank(
    pool: Any, size: int, axes: dict[str, int], dtype: str, tied: bool
) -> None:
    for outcome in pool(size).run(train, dtype, axes, tied):
        assert_same_bits(outcome, one_rank(dtype, tied))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_context_parallel_log_probabilities_have_the_bits_of_one_rank(pool2: Pool, dtype: str) -> None:
    expected = one_rank(dtype)
    for outcome in pool2.run(train, dtype, {"cp": 2}):
        assert outcome.losses[0] == expected.losses[0]
        for a, b in zip(outcome.before, expected.before, strict=True):
            assert torch.equal(a, b)
        for a, b in zip(outcome.first_logprobs, expected.first_logprobs, strict=True):
            assert torch.equal(a.nan_to_num(1.0), b.nan_to_num(1.0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("size", "axes"), meshes())
def test_sampled_equals_trained_bitwise_after_steps(pool: Any, size: int, axes: dict[str, int], dtype: str) -> None:
    results = pool(size).run(sample_after_steps, dtype, axes)
    assert [worst for _, worst in results] == [0.0] * size
    assert all(tokens == results[0][0] for tokens, _ in results)
