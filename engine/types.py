"""What goes in and what comes out: sampling parameters, completions, training samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from engine.errors import InputError

Prompt = str | list[int]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to sample; names and defaults follow vLLM's `SamplingParams`.

    `temperature=0` is greedy. `seed=None` draws a seed per call. `logprobs=k` also returns the k most likely
    alternatives per token. Token i of completion j of a prompt is a function of (seed, prompt index, j, i) and the
    model alone: it does not depend on what else is running.
    """

    n: int = 1
    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int = 0

    def __post_init__(self) -> None:
        checks = [
            ("n", self.n >= 1, "at least 1"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0.0, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "in (0, 1]"),
            ("min_p", 0.0 <= self.min_p < 1.0, "in [0, 1)"),
            ("logprobs", 0 <= self.logprobs <= 64, "between 0 and 64"),
        ]
        for name, ok, limit in checks:
            if not ok:
                raise InputError(f"SamplingParams.{name} is {getattr(self, name)}; it must be {limit}")
        if isinstance(self.stop, str):
            raise InputError(f"SamplingParams.stop is the string {self.stop!r}; pass a tuple of strings")


@dataclass
class Completion:
    """One sampled continuation.

    `logprobs[i]` is log p(token_ids[i]) under the full softmax at the sampling temperature (at temperature 1 when
    greedy), float32. `kept_mass[i]` is the probability that top-k, top-p and min-p left in, or None when no filter
    was on; the sampling distribution is p / kept_mass.
    """

    token_ids: list[int]
    logprobs: torch.Tensor
    text: str
    finish_reason: str  # "stop" | "length" | "abort"
    weight_version: int
    num_cached_tokens: int
    prompt_token_ids: list[int] = field(default_factory=list)
    kept_mass: torch.Tensor | None = None
    top_logprobs: list[dict[int, float]] | None = None


@dataclass
class StreamEvent:
    """One step of one completion: the tokens that came, and the whole completion when it is finished."""

    prompt_index: int
    sample_index: int
    token_ids: list[int]
    logprobs: torch.Tensor
    text: str
    completion: Completion | None = None


@dataclass
class Sample:
    """One sequence to train on.

    `tokens` has L ids. `loss_mask`, `advantages`, `old_logprobs` and `ref_logprobs` are per token, length L, and
    speak of the token at the same index (index 0 is never predicted, so its mask must be 0). A float `advantages`
    stands for every token. `temperature` is the one the tokens were sampled at (0 counts as 1).
    """

    tokens: list[int]
    loss_mask: list[int] | torch.Tensor
    advantages: float | list[float] | torch.Tensor = 1.0
    old_logprobs: list[float] | torch.Tensor | None = None
    ref_logprobs: list[float] | torch.Tensor | None = None
    temperature: float = 1.0
    weight_version: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_completion(
        cls, prompt_token_ids: list[int], completion: Completion, advantage: float = 1.0, temperature: float = 1.0
    ) -> Sample:
        """Prompt masked, completion trained on; `old_logprobs` are the sampled ones."""
        zeros = torch.zeros(len(prompt_token_ids))
        return cls(
            tokens=prompt_token_ids + completion.token_ids,
            loss_mask=[0] * len(prompt_token_ids) + [1] * len(completion.token_ids),
            advantages=advantage,
            old_logprobs=torch.cat([zeros, completion.logprobs]),
            temperature=temperature,
            weight_version=completion.weight_version,
        )


@dataclass
class TrainStats:
    """What `forward_backward` saw.

    `logprobs` are float32 (float64 with a float64 model) [L - 1] per sample, in the order given: entry i - 1 is that of
    token i where its mask is 1, NaN where it is 0. `metrics` has entropy, clip_fraction, ratio_mean, ratio_max, kl_old,
    kl_ref (as far as samples and loss give rise to them), max_staleness in weight versions, micro_batches and
    packing_fill.
    """

    loss: float
    num_tokens: int  # tokens that went through the model
    num_loss_tokens: int
    max_abs_logprob_difference: float | None  # against old_logprobs, over loss tokens; None where none were given
    metrics: dict[str, float]
    logprobs: list[torch.Tensor]


@dataclass
class StepStats:
    """What `optim_step` did."""

    grad_norm: float
    learning_rate: float
    weight_version: int
