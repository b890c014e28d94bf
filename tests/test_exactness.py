"""The claim: a token's sampled log-probability is, to the last bit, the one its gradient is taken at.

By transitivity: decode, prefill, chunked prefill, cached prefixes, preemption and recomputation all equal the training
forward, for every architecture and dtype, and so equal each other.
"""

from __future__ import annotations

import functools
from itertools import chain

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import Engine, EngineConfig, Sample, SamplingParams
from engine.kernels.op import extension, isas, use_isa
from engine.model import Transformer
from tests.exactness import assert_exact, engine_of, prompts_of
from tests.tiny import FAMILIES, tiny_config

DTYPES = ("float32", "bfloat16")
make = functools.partial(engine_of, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_sampled_logprobs_equal_trained_logprobs_bitwise(architecture, dtype):
    engine = make(architecture, dtype)
    assert_exact(engine, prompts_of([1, 7, 33, 70]), SamplingParams(n=3, max_tokens=24, seed=1, ignore_eos=True))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    architecture=st.sampled_from(FAMILIES),
    dtype=st.sampled_from(DTYPES),
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    shared=st.sampled_from([0, 15, 16, 40]),
    n=st.integers(1, 5),
    max_tokens=st.integers(1, 30),
    max_batch_tokens=st.sampled_from([3, 17, 64, 256]),
    page_size=st.sampled_from([16, 32, 64]),
    pool=st.sampled_from([192, 320, 2048]),
    prefix_caching=st.booleans(),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
)
def test_exact_whatever_the_schedule(
    architecture, dtype, lengths, shared, n, max_tokens, max_batch_tokens, page_size, pool, prefix_caching, temperature
):
    config = {
        "max_batch_tokens": max_batch_tokens,
        "page_size": page_size,
        "kv_tokens": pool,
        "max_seqs": 16,
        "prefix_caching": prefix_caching,
    }
    prompts = prompts_of(lengths, shared)
    params = SamplingParams(n=n, max_tokens=max_tokens, temperature=temperature, seed=3, ignore_eos=True)
    tokens = assert_exact(make(architecture, dtype, **config), prompts, params)
    calm = make(architecture, dtype).generate(prompts, params)
    assert tokens == [[c.token_ids for c in row] for row in calm]


def test_tokens_do_not_depend_on_what_else_runs():
    engine = make()
    prompts = prompts_of([5, 40, 64])
    params = SamplingParams(n=2, max_tokens=16, seed=11, ignore_eos=True)
    together = engine.generate(prompts, params)
    crowd = engine.generate(prompts + prompts_of([9, 30, 50, 80], shared=3), params)
    assert [[c.token_ids for c in row] for row in together] == [[c.token_ids for c in row] for row in crowd[:3]]


def test_preemption_happens_and_changes_no_bit():
    engine = make(kv_tokens=160)
    before = engine.sampler.stats.preemptions
    assert_exact(engine, prompts_of([20, 25, 30]), SamplingParams(n=2, max_tokens=40, seed=5, ignore_eos=True))
    assert engine.sampler.stats.preemptions > before


def test_cached_prefix_is_used_and_changes_no_bit():
    engine = make()
    prompts = prompts_of([70])
    params = SamplingParams(max_tokens=20, seed=2, ignore_eos=True)
    engine.sampler.cache.forget()
    first = engine.generate(prompts, params)[0][0]
    second = engine.generate(prompts, params)[0][0]
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 64)
    assert first.token_ids == second.token_ids
    assert torch.equal(first.logprobs, second.logprobs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_recorded_forward_equals_eager_forward_bitwise(dtype, monkeypatch):
    prompts, params = prompts_of([3, 50]), SamplingParams(n=2, max_tokens=12, seed=4, ignore_eos=True)
    recorded = make("LlamaForCausalLM", dtype).generate(prompts, params)
    monkeypatch.setattr(Transformer, "recordable", False)
    eager = make("LlamaForCausalLM", dtype, max_seqs=31).generate(prompts, params)
    for a, b in zip(chain(*recorded), chain(*eager), strict=True):
        assert torch.equal(a.logprobs, b.logprobs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", isas())
def test_exact_on_every_instruction_set(isa, dtype):
    with use_isa(isa):
        engine = make("Qwen3ForCausalLM", dtype)
        engine.sampler.cache.forget()
        assert_exact(engine, prompts_of([5, 60]), SamplingParams(n=4, max_tokens=12, seed=1, ignore_eos=True))
        engine.sampler.cache.forget()


def test_any_number_of_threads_gives_the_same_bits():
    engine, prompts = make(), prompts_of([30, 64])
    params = SamplingParams(n=4, max_tokens=20, seed=9, ignore_eos=True)
    before = extension().num_threads()
    seen = []
    try:
        for threads in (1, 2, 3):
            extension().set_num_threads(threads)
            engine.sampler.cache.forget()
            seen.append(torch.cat([c.logprobs for row in engine.generate(prompts, params) for c in row]))
    finally:
        extension().set_num_threads(before)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_after_optimizer_steps_with_a_tiny_pool(dtype):
    engine = Engine.from_config(
        tiny_config(initializer_range=0.1),
        EngineConfig(dtype=dtype, device="cpu", kv_tokens=192, max_batch_tokens=40, max_seqs=8),
    )
    prompts = prompts_of([20, 33], shared=16)
    for step in range(10):
        params = SamplingParams(n=3, max_tokens=24, seed=step, ignore_eos=True)
        results = engine.generate(prompts, params)
        samples = [
            Sample.from_completion(p, c, advantage=(-1.0) ** i)
            for p, row in zip(prompts, results, strict=True)
            for i, c in enumerate(row)
        ]
        stats = engine.forward_backward(samples, "grpo")
        assert stats.max_abs_logprob_difference == 0.0, f"step {step}"
        engine.optim_step(learning_rate=1e-3)
    assert engine.weight_version == 10
    assert engine.sampler.stats.preemptions > 0


def test_a_planted_fault_is_caught(monkeypatch):
    """A matmul that picks its order of summation by the number of rows is what exactness forbids."""
    import engine.parallel.tensor as layers

    right = layers.linear

    def picks_by_rows(x, weight, bias=None, out_dtype=None):
        if x.shape[0] > 8:
            return right(x, weight, bias, out_dtype)
        dense, half = weight.dense().float(), x.shape[1] // 2
        y = x[:, :half].float() @ dense[:, :half].T + x[:, half:].float() @ dense[:, half:].T
        return (y if bias is None else y + bias.data.float()).to(out_dtype or x.dtype)

    monkeypatch.setattr(layers, "linear", picks_by_rows)
    monkeypatch.setattr(Transformer, "recordable", False)  # or the fault is recorded away
    engine = make("LlamaForCausalLM", "float32", max_seqs=30)
    with pytest.raises(AssertionError, match=r"sampled .* trained"):
        assert_exact(engine, prompts_of([40]), SamplingParams(max_tokens=20, seed=1, ignore_eos=True))
