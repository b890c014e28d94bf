"""Several ranks on Triton kernels, each on a GPU of its own where there are as many: what they sample, score and train
agrees to the bit there too."""

from __future__ import annotations

import pytest

from engine import Engine, EngineConfig, Sample, SamplingParams
from engine.config import ParallelConfig
from engine.kernels.op import triton_missing, use_backend
from tests.parallel.pool import Pool
from tests.tiny import tiny_config

pytestmark = pytest.mark.skipif(bool(triton_missing()), reason=triton_missing() or "installed")
PROMPTS = [[3, 4, 5, 6, 7], [8, 9]]


def play(parallel: ParallelConfig) -> tuple[float | None, bool]:
    """The largest difference between sampled and trained log-probabilities, and whether scores are the same."""
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    model = tiny_config("Qwen3ForCausalLM", **sizes, num_attention_heads=2, head_dim=16, initializer_range=0.3)
    config = EngineConfig(
        device="auto", dtype="float32", kv_tokens=64, max_batch_tokens=8, max_seqs=4, parallel=parallel
    )
    with use_backend("triton"):
        engine = Engine.from_config(model, config)
        results = engine.generate(PROMPTS, SamplingParams(max_tokens=2, seed=1, ignore_eos=True))
        pairs = [(prompt, row[0]) for prompt, row in zip(PROMPTS, results, strict=True)]
        scores = engine.score([prompt + each.token_ids for prompt, each in pairs])
        stats = engine.forward_backward([Sample.from_completion(prompt, each) for prompt, each in pairs], "grpo")
        engine.optim_step(1e-2)
        engine.close()
    same = [(score[-2:] == each.logprobs).all() for score, (_, each) in zip(scores, pairs, strict=True)]
    return stats.max_abs_logprob_difference, all(same)


@pytest.mark.parametrize("axis", ["dp", "pp", "cp", "tp"])
def test_sampled_scored_and_trained_logprobs_are_equal_bitwise(pool2: Pool, axis: str) -> None:
    assert pool2.run(play, ParallelConfig(**{axis: 2})) == [(0.0, True)] * 2
