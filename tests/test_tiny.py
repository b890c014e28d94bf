"""The main job in miniature, in seconds: sample, check, learn, save, go on. Run this one first."""

import torch

from engine import Engine, EngineConfig, Sample, SamplingParams
from tests.tiny import tiny_config

CONFIG = EngineConfig(dtype="bfloat16", kv_tokens=1024, max_batch_tokens=128, max_seqs=32)
PROMPTS = [[7, 8, 9], [20] * 18]
WANTED = 42  # the reward: how often this token is sampled


def rollout(engine: Engine, seed: int) -> list[Sample]:
    """Groups of 16 with group-relative advantages."""
    params = SamplingParams(n=16, max_tokens=8, seed=seed, ignore_eos=True)
    samples = []
    for prompt, group in zip(PROMPTS, engine.generate(PROMPTS, params), strict=True):
        rewards = [float(c.token_ids.count(WANTED)) for c in group]
        mean = sum(rewards) / len(rewards)
        samples += [Sample.from_completion(prompt, c, r - mean) for c, r in zip(group, rewards, strict=True)]
    return samples


def share(samples: list[Sample]) -> float:
    """Of the sampled tokens, how many are the wanted one."""
    sampled = [t for s in samples for t, m in zip(s.tokens, s.loss_mask, strict=True) if m]
    return sampled.count(WANTED) / len(sampled)


def test_one_process_samples_and_learns_on_one_copy_of_the_weights(tmp_path):
    engine = Engine.from_config(tiny_config(vocab_size=64), CONFIG, seed=1)
    addresses = engine.weight_addresses()
    first = share(rollout(engine, seed=0))
    for step in range(40):
        stats = engine.forward_backward(rollout(engine, seed=step), "dapo")
        assert stats.max_abs_logprob_difference == 0.0, f"step {step}"
        engine.optim_step(learning_rate=1e-2)
    assert share(rollout(engine, seed=0)) > 10 * first > 0
    assert engine.weight_addresses() == addresses

    engine.save_pretrained(tmp_path / "model")
    again = Engine.from_pretrained(tmp_path / "model", CONFIG)
    prompt, greedy = PROMPTS[1], SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    (ours,), (theirs,) = (e.generate([prompt], greedy)[0] for e in (engine, again))
    assert ours.token_ids == theirs.token_ids
    assert torch.equal(ours.logprobs, again.score([prompt + ours.token_ids])[0][len(prompt) - 1 :])
