"""The claim of test_exactness.py on schedules drawn at random, which no kernel has to be compiled for, on every
instruction set, with any number of threads."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import SamplingParams
from engine.kernels.op import cpu_missing, extension, isas, use_isa
from tests.exactness import assert_exact, engine_of, prompts_of
from tests.kernels.cases import needs_cpu
from tests.tiny import FAMILIES

pytestmark = needs_cpu
DTYPES = ("float32", "bfloat16")
make = functools.partial(engine_of, "cpu")


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", [] if cpu_missing() else isas())
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
