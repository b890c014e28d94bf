"""Sampling on a mesh: the completions of one rank, whoever sampled them."""

from __future__ import annotations

from typing import Any

import pytest

from engine import Completion, Engine, EngineConfig, SamplingParams
from engine.config import ParallelConfig
from engine.parallel.mesh import Mesh
from tests.parallel.pool import Pool
from tests.tiny import tiny_config

PROMPTS = [[3 + i, 5, 7 + i % 3] + [11] * (i * 7 % 40) for i in range(12)]
PARAMS = [
    SamplingParams(n=1 + i % 3, max_tokens=4 + i * 5 % 17, seed=i, top_p=0.9 if i % 4 == 0 else 1.0, logprobs=i % 3)
    for i in range(12)
]


def make(parallel: ParallelConfig, mesh: Mesh | None = None, **options: Any) -> Engine:
    settings: dict[str, Any] = {"dtype": "float32", "kv_tokens": 1024, "max_batch_tokens": 64, "max_seqs": 8}
    config = EngineConfig(parallel=parallel, **(settings | options))
    model = tiny_config(initializer_range=0.2, num_hidden_layers=4, num_key_value_heads=2)
    return Engine.from_config(model, config, seed=1, mesh=mesh)


def plain(results: list[list[Completion]]) -> list[Any]:
    """All that a caller sees but for how much the cache held."""
    return [
        (c.token_ids, c.logprobs.tolist(), c.finish_reason, c.prompt_token_ids, c.top_logprobs, c.text)
        + (None if c.kept_mass is None else c.kept_mass.tolist(),)
        for row in results
        for c in row
    ]


def sampled(parallel: ParallelConfig, **options: Any) -> tuple[list[Any], list[Any], dict[str, int]]:
    """The completions of a mesh, twice, those of this rank alone, and what the sampler counted."""
    engine = make(parallel, **options)
    on_mesh = plain(engine.generate(PROMPTS, PARAMS)), plain(engine.generate(PROMPTS, PARAMS))
    alone = plain(make(ParallelConfig(), Mesh.single(), **options).generate(PROMPTS, PARAMS))
    assert on_mesh[0] == on_mesh[1]
    assert engine.sampler.cache.num_free == engine.sampler.cache.num_pages
    engine.close()
    return on_mesh[0], alone, vars(engine.sampler.stats)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(dp=2),
        ParallelConfig(pp=2),
        ParallelConfig(pp=2, schedule="interleaved", virtual_stages=2),
    ],
    ids=str,
)
def test_completions_are_those_of_one_rank_bitwise(pool2: Pool, parallel: ParallelConfig, dtype: str) -> None:
    for on_mesh, alone, _ in pool2.run(sampled, parallel, dtype=dtype):
        assert on_mesh == alone


@pytest.mark.parametrize("parallel", [ParallelConfig(dp=2, pp=2), ParallelConfig(pp=4)], ids=str)
def test_completions_are_those_of_one_rank_on_four_bitwise(pool4: Pool, parallel: ParallelConfig) -> None:
    for on_mesh, alone, _ in pool4.run(sampled, parallel):
        assert on_mesh == alone


def test_preemption_under_a_pipeline_changes_no_bit(pool2: Pool) -> None:
    results = pool2.run(sampled, ParallelConfig(pp=2), kv_tokens=128)
    for on_mesh, alone, counts in results:
        assert counts["preemptions"] > 0
        assert on_mesh == alone
