"""What the tests of exactness share: engines, prompts, and the comparison."""

from __future__ import annotations

import functools
from typing import Any

import torch

from engine import Engine, EngineConfig, Sample, SamplingParams
from tests.tiny import tiny_config


@functools.cache
def engine_of(
    device: str, architecture: str = "LlamaForCausalLM", dtype: str = "bfloat16", **config: int | str | bool
) -> Engine:
    """A tiny model on that device, made once; `config` is of EngineConfig."""
    overrides: dict[str, Any] = {"kv_tokens": 2048, "max_batch_tokens": 256, "max_seqs": 32, **config}
    model = tiny_config(architecture, initializer_range=0.2)
    return Engine.from_config(model, EngineConfig(dtype=dtype, device=device, **overrides))


def prompts_of(lengths: list[int], shared: int = 0) -> list[list[int]]:
    """One prompt per length; all begin with the same `shared` tokens."""
    generator = torch.Generator().manual_seed(sum(lengths) + shared)
    head = torch.randint(3, 300, (shared,), generator=generator).tolist()
    return [head + torch.randint(3, 300, (n,), generator=generator).tolist() for n in lengths]


def first_difference(a: torch.Tensor, b: torch.Tensor) -> str:
    index = int((a != b).nonzero()[0])
    return f"token {index}: sampled {a[index].item()!r}, trained {b[index].item()!r}"


def assert_exact(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[list[list[int]]]:
    """Samples, scores and trains on the same tokens; all three must agree to the bit. Returns the tokens."""
    results = engine.generate(prompts, params)
    pairs = [(p, c) for p, row in zip(prompts, results, strict=True) for c in row]
    heat = params.temperature or 1.0
    scores = engine.score([p + c.token_ids for p, c in pairs], temperature=heat)
    for (prompt, completion), score in zip(pairs, scores, strict=True):
        trained = score[len(prompt) - 1 :]
        assert torch.equal(completion.logprobs, trained), first_difference(completion.logprobs, trained)
    samples = [Sample.from_completion(p, c, temperature=heat) for p, c in pairs]
    stats = engine.forward_backward(samples, "sft")
    assert stats.max_abs_logprob_difference == 0.0
    for weight in engine.model.weights():
        weight.zero_grad()
    return [[c.token_ids for c in row] for row in results]
