"""The claim: a token's sampled log-probability is, to the last bit, the one its gradient is taken at.

By transitivity: decode, prefill, chunked prefill, cached prefixes, preemption and recomputation all equal the training
forward, for every architecture and dtype, and so equal each other. Every scenario runs on a CPU and, where there is
one, on a GPU; test_exactness_cpu.py has what a CPU alone can be asked.
"""

from __future__ import annotations

import functools
from itertools import chain

import pytest
import torch

from engine import Engine, EngineConfig, Sample, SamplingParams
from engine.model import Transformer
from tests.exactness import assert_exact, engine_of, prompts_of
from tests.kernels.cases import needs_cpu
from tests.tiny import FAMILIES, tiny_config

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="it takes a GPU")
DTYPES = ("float32", "bfloat16")


def on(device: str, *values: str) -> object:
    """A case for tests of that device."""
    return pytest.param(device, *values, marks={"cpu": needs_cpu, "cuda": needs_gpu}[device])


@pytest.fixture(params=[on("cpu"), on("cuda")])
def device(request):
    return request.param


@pytest.fixture
def make(device):
    """Makes engines on the device. A GPU's kernels take long to compile, so it is given batches of one kind."""
    return functools.partial(engine_of, device, **({"max_batch_tokens": 64} if device == "cuda" else {}))


# Device, family, dtype of the model, dtype of keys and values.
ENGINES = [
    *(on("cpu", family, dtype, "auto") for family in FAMILIES for dtype in DTYPES),
    *(on("cuda", family, "bfloat16", "auto") for family in FAMILIES),
    on("cuda", "MistralForCausalLM", "float32", "auto"),
    on("cuda", "Qwen3ForCausalLM", "float16", "auto"),
    on("cuda", "Qwen3ForCausalLM", "bfloat16", "fp8_e4m3"),
]
SCHEDULES = [
    {"max_batch_tokens": 3},
    {"max_batch_tokens": 17, "page_size": 32},
    {"max_batch_tokens": 300, "prefix_caching": False},  # more rows than a CUDA graph has
    {"kv_tokens": 192, "page_size": 64},
    {"kv_tokens": 320, "max_seqs": 5},
]


@pytest.mark.parametrize(("device", "architecture", "dtype", "kv_dtype"), ENGINES)
def test_sampled_logprobs_equal_trained_logprobs_bitwise(make, architecture, dtype, kv_dtype):
    engine = make(architecture, dtype, kv_dtype=kv_dtype)
    assert_exact(engine, prompts_of([1, 7, 33, 70]), SamplingParams(n=3, max_tokens=24, seed=1, ignore_eos=True))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("config", SCHEDULES, ids=str)
def test_exact_on_schedules_of_every_kind(make, config, temperature):
    prompts = prompts_of([90, 5, 33], shared=40)
    params = SamplingParams(n=2, max_tokens=30, temperature=temperature, top_p=0.9, seed=3, ignore_eos=True)
    tokens = assert_exact(make(**config), prompts, params)
    calm = make().generate(prompts, params)
    assert tokens == [[c.token_ids for c in row] for row in calm]


def test_exact_over_several_splits_of_keys(device):
    """Prompts of more than 512 and of more than 1,024 keys, alike at first, so that siblings read them together."""
    model = tiny_config(initializer_range=0.2, max_position_embeddings=2048, rope_scaling=None)
    config = EngineConfig(dtype="bfloat16", device=device, kv_tokens=8192, max_batch_tokens=256, max_seqs=16)
    prompts = prompts_of([100, 500], shared=600)
    assert_exact(
        Engine.from_config(model, config), prompts, SamplingParams(n=4, max_tokens=12, seed=1, ignore_eos=True)
    )


def test_tokens_do_not_depend_on_what_else_runs(make):
    engine, prompts = make(), prompts_of([5, 40, 64])
    params = SamplingParams(n=2, max_tokens=16, seed=11, ignore_eos=True)
    together = engine.generate(prompts, params)
    crowd = engine.generate(prompts + prompts_of([9, 30, 50, 80], shared=3), params)
    assert [[c.token_ids for c in row] for row in together] == [[c.token_ids for c in row] for row in crowd[:3]]


def test_preemption_happens_and_changes_no_bit(make):
    engine = make(kv_tokens=160)
    before = engine.sampler.stats.preemptions
    assert_exact(engine, prompts_of([20, 25, 30]), SamplingParams(n=2, max_tokens=40, seed=5, ignore_eos=True))
    assert engine.sampler.stats.preemptions > before


def test_cached_prefix_is_used_and_changes_no_bit(make):
    engine, prompts, params = make(), prompts_of([70]), SamplingParams(max_tokens=20, seed=2, ignore_eos=True)
    engine.sampler.cache.forget()
    first, second = (engine.generate(prompts, params)[0][0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 64)
    assert first.token_ids == second.token_ids
    assert torch.equal(first.logprobs, second.logprobs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_recorded_forwards_equal_eager_forwards_bitwise(make, dtype, monkeypatch):
    prompts, params = prompts_of([3, 50]), SamplingParams(n=2, max_tokens=12, seed=4, ignore_eos=True)
    recorded = make("LlamaForCausalLM", dtype).generate(prompts, params)
    monkeypatch.setattr(Transformer, "recordable", False)
    eager = make("LlamaForCausalLM", dtype, max_seqs=31).generate(prompts, params)
    for a, b in zip(chain(*recorded), chain(*eager), strict=True):
        assert torch.equal(a.logprobs, b.logprobs)


def test_alternatives_are_scored_by_the_function_that_scores_tokens(make):
    params = SamplingParams(max_tokens=8, temperature=0.0, logprobs=5, seed=1, ignore_eos=True)
    ((completion,),) = make().generate(prompts_of([20]), params)
    for token, logprob, choices in zip(
        completion.token_ids, completion.logprobs.tolist(), completion.top_logprobs, strict=True
    ):
        assert choices[token] == logprob


@pytest.mark.parametrize(("dtype", "checkpointing"), [("float32", False), ("bfloat16", False), ("bfloat16", True)])
def test_exact_after_optimizer_steps_with_a_tiny_pool(device, dtype, checkpointing):
    config = EngineConfig(
        dtype=dtype, device=device, kv_tokens=192, max_batch_tokens=40, max_seqs=8,
        activation_checkpointing=checkpointing,
    )  # fmt: skip
    engine, prompts = Engine.from_config(tiny_config(initializer_range=0.1), config), prompts_of([20, 33], shared=16)
    for step in range(10):
        results = engine.generate(prompts, SamplingParams(n=3, max_tokens=24, seed=step, ignore_eos=True))
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


def test_a_planted_fault_is_caught(make, monkeypatch):
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
    # A recording on a CPU would leave the fault out, and a capture on a GPU may not load what torch multiplies with.
    monkeypatch.setattr(Transformer, "recordable", False)
    engine = make("LlamaForCausalLM", "float32", max_seqs=30)
    with pytest.raises(AssertionError, match=r"sampled .* trained"):
        assert_exact(engine, prompts_of([40]), SamplingParams(max_tokens=20, seed=1, ignore_eos=True))
