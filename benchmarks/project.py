"""This engine under the workloads, through its public API."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.workloads import Generation
from engine import Completion, Engine, EngineConfig, InputError, ModelConfig, ParallelConfig, Sample, SamplingParams

PAGE_SIZE = 16


@dataclass(frozen=True)
class GrpoStep:
    """Where the time of one GRPO step went, and the largest difference between sampled and trained log-probability."""

    rollout_s: float
    train_s: float
    output_tokens: int
    max_abs_logprob_difference: float

    @property
    def step_s(self) -> float:
        return self.rollout_s + self.train_s


def kv_tokens(works: list[Generation]) -> int:
    """A pool in which every workload fits without preemption: partly filled pages counted."""
    return max((w.kv_tokens + 2 * PAGE_SIZE * w.n * len(w.prompts) for w in works), default=PAGE_SIZE)


class Project:
    """An engine with random weights, or those of a Hugging Face directory."""

    name = "caduceus"

    def __init__(
        self,
        model: ModelConfig,
        works: list[Generation],
        dtype: str = "bfloat16",
        checkpoint: Path | None = None,
        parallel: ParallelConfig | None = None,
        threads: int = 0,
        device: str = "cpu",
    ) -> None:
        pool = -(-kv_tokens(works) // PAGE_SIZE) * PAGE_SIZE
        config = EngineConfig(device=device, dtype=dtype, kv_tokens=pool, page_size=PAGE_SIZE, threads=threads,
                              parallel=parallel or ParallelConfig())  # fmt: skip
        if checkpoint is not None:
            self.engine = Engine.from_pretrained(checkpoint, config)
        else:
            self.engine = Engine.from_config(model, config, seed=0)

    def generate(self, work: Generation, max_new: int | None = None) -> list[list[Completion]]:
        """Runs the workload (`max_new` tokens of each instead, if given), nothing of it cached from a run before."""
        self.engine.sampler.cache.forget()
        params = [
            SamplingParams(n=work.n, max_tokens=max_new or m, temperature=work.temperature, seed=0, ignore_eos=True)
            for m in work.max_new
        ]
        results = self.engine.generate(work.prompts, params)
        made = sum(len(c.token_ids) for samples in results for c in samples)
        wanted = work.n * (max_new * len(work.prompts) if max_new else sum(work.max_new))
        if made != wanted or not all(torch.isfinite(c.logprobs).all() for samples in results for c in samples):
            raise InputError(f"{work.name} came back with {made} tokens, not {wanted}, or with infinite logprobs")
        return results

    def train_step(self, sequences: list[list[int]]) -> float:
        """Forward, backward and optimizer step on whole sequences; returns the optimizer's seconds."""
        self.engine.forward_backward([Sample(s, [0] + [1] * (len(s) - 1)) for s in sequences], "sft")
        start = time.perf_counter()
        self.engine.optim_step(learning_rate=1e-5)
        return time.perf_counter() - start

    def grpo_step(self, work: Generation) -> GrpoStep:
        """A rollout, rewards (the share of even ids), advantages within each group, gradient, optimizer step."""
        start = time.perf_counter()
        results = self.generate(work)
        sampled = time.perf_counter()
        samples = []
        for prompt, completions in zip(work.prompts, results, strict=True):
            rewards = torch.tensor([sum(t % 2 == 0 for t in c.token_ids) / len(c.token_ids) for c in completions])
            advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
            samples += [
                Sample.from_completion(prompt, completion, advantage)
                for completion, advantage in zip(completions, advantages.tolist(), strict=True)
            ]
        stats = self.engine.forward_backward(samples, "grpo")
        self.engine.optim_step(learning_rate=1e-6)
        done = time.perf_counter()
        difference = stats.max_abs_logprob_difference
        assert difference is not None  # every sample came with its sampled log-probabilities
        return GrpoStep(sampled - start, done - sampled, work.output_tokens, difference)
