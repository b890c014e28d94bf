"""Sampling on a mesh: the completions of one rank, whoever sampled them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine import CapacityError, Completion, Engine, EngineConfig, InputError, NumericsError, Sample, SamplingParams
from engine.config import ParallelConfig
from engine.errors import ParallelError
from engine.parallel.mesh import Mesh, fingerprint
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
        [c.token_ids, c.logprobs.tolist(), kept(c), c.finish_reason, c.prompt_token_ids, c.top_logprobs, c.text]
        for row in results
        for c in row
    ]


def kept(completion: Completion) -> list[float] | None:
    return None if completion.kept_mass is None else completion.kept_mass.tolist()


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


def spread(parallel: ParallelConfig) -> tuple[list[int], int, int]:
    """Tokens of each of 32 completions, of which one is long, and how many this rank computed and sampled."""
    engine = make(parallel, max_seqs=4, prefix_caching=False)
    lengths = [200 if i == 0 else 8 for i in range(32)]
    params = [SamplingParams(max_tokens=length, ignore_eos=True, seed=1) for length in lengths]
    rows = engine.generate([[4 + i, 9] for i in range(32)], params)
    stats = engine.sampler.stats
    engine.close()
    return [len(row[0].token_ids) for row in rows], stats.sampled_tokens, stats.steps


def test_one_long_answer_leaves_the_others_to_the_other_replica(pool2: Pool) -> None:
    (lengths, tokens, steps), (again, more_tokens, more_steps) = pool2.run(spread, ParallelConfig(dp=2))
    assert lengths == again == [200] + [8] * 31
    assert tokens + more_tokens == sum(lengths)  # every sample once
    long, short = sorted([(steps, tokens), (more_steps, more_tokens)], reverse=True)
    assert long[0] < 210  # the long answer began at once, and nothing was put behind it
    assert short[1] >= 8 * 8


def test_tensor_parallel_replicas_share_a_queue(pool4: Pool) -> None:
    """Two replicas of two ranks give what one such replica gives."""
    on_mesh = pool4.run(replicas, ParallelConfig(dp=2, tp=2))
    assert on_mesh[0][0] == on_mesh[0][1]
    assert on_mesh.count(on_mesh[0]) == 4


def replicas(parallel: ParallelConfig) -> tuple[list[Any], list[Any]]:
    engine = make(parallel)
    both = plain(engine.generate(PROMPTS, PARAMS))
    stream = engine.stream(PROMPTS, PARAMS)  # every replica runs all prompts
    ended = {(e.prompt_index, e.sample_index): e.completion for e in stream if e.completion is not None}
    engine.close()
    return both, plain([[ended[place]] for place in sorted(ended)])


def broken(parallel: ParallelConfig) -> tuple[list[str], bool]:
    """Only one prompt reaches the row of the embedding that is not a number; which error each rank sees."""
    engine = make(parallel)
    if engine.model.has_first:
        row = engine.model.embed.dense()
        row[201] = float("nan")
        engine.model.embed.load_(row)
    seen = []
    prompts = [[5, 6 + i] for i in range(8)]
    params = SamplingParams(max_tokens=6, ignore_eos=True, temperature=0, seed=1)
    for bad in (3, 6):
        try:
            engine.generate([*prompts[:bad], [201, 3], *prompts[bad:]], params)
        except NumericsError as error:
            seen.append(str(error))
    after = engine.generate(prompts, params)
    free = engine.sampler.cache.num_free == engine.sampler.cache.num_pages
    engine.close()
    return seen, free and len(after) == 8


@pytest.mark.parametrize("parallel", [ParallelConfig(dp=2), ParallelConfig(pp=2)], ids=str)
def test_numbers_that_are_not_finite_raise_on_every_rank_and_the_engine_stays_usable(
    pool2: Pool, parallel: ParallelConfig
) -> None:
    for seen, usable in pool2.run(broken, parallel):
        assert len(seen) == 2 and all("not finite" in text for text in seen)
        assert usable


def disagreeing() -> str:
    engine = make(ParallelConfig(dp=2))
    prompts = [[5, 6, 7]] if engine.mesh.rank == 0 else [[5, 6, 8]]
    with pytest.raises(ParallelError) as caught:
        engine.generate(prompts)
    engine.generate([[5, 6, 7]], SamplingParams(max_tokens=2))
    return str(caught.value)


def test_ranks_that_ask_for_different_things_are_named(pool2: Pool) -> None:
    for message in pool2.run(disagreeing):
        assert "generate was called with other arguments on rank 1 than on rank 0" in message


def refused() -> list[str]:
    engine = make(ParallelConfig(dp=2), kv_tokens=64)
    seen = []
    for prompts in ([[1] * 100], [[]], [[1, 9999]]):
        with pytest.raises((CapacityError, InputError)) as caught:
            engine.generate(prompts)
        seen.append(str(caught.value))
    assert len(engine.generate([[1, 2]], SamplingParams(max_tokens=3, ignore_eos=True))[0][0].token_ids) == 3
    return seen


def test_what_cannot_be_sampled_is_refused_alike_on_every_rank(pool2: Pool) -> None:
    first, second = pool2.run(refused)
    assert first == second


def streamed(parallel: ParallelConfig) -> tuple[list[list[int]], list[list[int]], int]:
    """Tokens by a stream, by generate while another stream is half-way, and what is left afterwards."""
    engine = make(parallel)
    params = SamplingParams(max_tokens=10, ignore_eos=True, seed=4)
    tokens: list[list[int]] = [[] for _ in range(4)]
    for event in engine.stream(PROMPTS[:4], params):
        tokens[event.prompt_index] += event.token_ids
    half = engine.stream(PROMPTS[4:8], params)
    next(half)
    whole = [row[0].token_ids for row in engine.generate(PROMPTS[:4], params)]
    half.close()
    engine.close()
    return tokens, whole, engine.sampler.num_unfinished


@pytest.mark.parametrize("parallel", [ParallelConfig(dp=2), ParallelConfig(pp=2)], ids=str)
def test_a_stream_gives_every_rank_what_generate_gives(pool2: Pool, parallel: ParallelConfig) -> None:
    for tokens, whole, unfinished in pool2.run(streamed, parallel):
        assert tokens == whole
        assert unfinished == 0


def seedless() -> list[list[int]]:
    engine = make(ParallelConfig(dp=2))
    return [row[0].token_ids for row in engine.generate(PROMPTS, SamplingParams(max_tokens=8))]


def test_a_seed_drawn_for_the_call_is_the_same_on_every_rank(pool2: Pool) -> None:
    first, second = pool2.run(seedless)
    assert first == second


def odd_one_out(name: str) -> str:
    """The error of a call whose arguments differ on rank 1."""
    engine = make(ParallelConfig(dp=2))
    here = engine.mesh.rank
    sample = Sample([1, 2, 3], [0, 1, 1], advantages=torch.tensor([0.0, 1.0, 1.0 + here]))
    calls: dict[str, Callable[[], object]] = {
        "score": lambda: engine.score([[1, 2, 3 + here]]),
        "forward_backward": lambda: engine.forward_backward([sample]),
        "optim_step": lambda: engine.optim_step(0.1 * (1 + here)),
    }
    with pytest.raises(ParallelError) as caught:
        calls[name]()
    return str(caught.value)


@pytest.mark.parametrize("name", ["score", "forward_backward", "optim_step"])
def test_a_rank_that_trains_on_something_else_is_named(pool2: Pool, name: str) -> None:
    for message in pool2.run(odd_one_out, name):
        assert f"{name} was called with other arguments on rank 1 than on rank 0" in message


def test_a_fingerprint_is_of_values_not_of_objects() -> None:
    sample = Sample([1, 2], [0, 1], old_logprobs=torch.tensor([0.0, -1.0]), extra={"why": {3: object()}})
    twin = Sample([1, 2], [0, 1], old_logprobs=torch.tensor([0.0, -1.0]), extra={"why": {3: object()}})
    other = Sample([1, 2], [0, 1], old_logprobs=torch.tensor([0.0, -1.5]), extra={"why": {3: object()}})
    assert fingerprint([sample]) == fingerprint([twin]) != fingerprint([other])
    assert fingerprint(2**70) == fingerprint(2**70) != fingerprint(2**71)


def test_more_alternatives_than_tokens_are_refused(pool2: Pool) -> None:
    assert pool2.run(too_many) == ["SamplingParams.logprobs is 64; there are 48 tokens"] * 2


def too_many() -> str:
    config = EngineConfig(dtype="float32", parallel=ParallelConfig(pp=2), kv_tokens=256)
    engine = Engine.from_config(tiny_config(vocab_size=48, tie_word_embeddings=False), config)
    with pytest.raises(InputError) as caught:
        engine.generate([[1, 2]], SamplingParams(logprobs=64))
    return str(caught.value)


def of_mesh(parallel: ParallelConfig) -> list[Any]:
    engine = make(parallel)
    results = plain(engine.generate(PROMPTS, PARAMS))
    engine.close()
    return results


def test_a_pipeline_of_tensor_parallel_stages_samples_what_one_such_stage_does(pool2: Pool, pool4: Pool) -> None:
    alone = pool2.run(of_mesh, ParallelConfig(tp=2))
    staged = pool4.run(of_mesh, ParallelConfig(pp=2, tp=2))
    assert staged == [alone[0]] * 4
