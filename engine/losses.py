"""Per-token losses of post-training, by name, and the one place where they are scaled by global counts.

# N loss tokens of one micro-batch, S samples of it

A loss maps a `LossBatch` to a loss per token, [N]. What a token weighs in the sum is a matter of aggregation
(`token_weights`) and counts every loss token of the whole `forward_backward` call, never those of one micro-batch:
how samples were packed does not show in the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from engine.errors import ConfigError, InputError, nearest
from engine.types import Sample

AGGREGATIONS = ("token", "sequence", "constant")
KL_ESTIMATORS = ("k1", "k2", "k3")

# exp(20) is far outside every clipping range; without a bound, exp overflows and inf * 0 makes the gradient NaN.
LOG_RATIO_LIMIT = 20.0


@dataclass
class LossBatch:
    """What a loss sees: the tokens with mask 1 of a micro-batch, sample after sample.

    `logprobs` and `entropy` carry gradients. Where a sample came without `old_logprobs` or `ref_logprobs`, these are
    NaN. `cu_seqlens[s]` is the first row of sample s and `positions` the index of each row's token in its sample, so
    a loss of one's own can read `samples[s].extra`. `num_loss_tokens` and `num_loss_samples` (samples with a loss
    token) count the whole call.
    """

    logprobs: Tensor  # [N] float32, or float64 with such a model, like the four that follow
    entropy: Tensor  # [N]
    advantages: Tensor  # [N]
    old_logprobs: Tensor  # [N]
    ref_logprobs: Tensor  # [N]
    positions: Tensor  # [N] int64
    sequence_ids: Tensor  # [N] int64
    cu_seqlens: Tensor  # [S + 1] int64
    samples: list[Sample]
    num_loss_tokens: int
    num_loss_samples: int

    def ratio(self) -> Tensor:
        """pi / mu of every token, [N], the log of it held within +-20."""
        return (self.logprobs - self.old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()

    def sequence_mean(self, values: Tensor) -> Tensor:
        """The mean of `values` [N] over each sample, given back to its tokens, [N]; float64 inside, no gradient."""
        ids, counts = self.sequence_ids.cpu(), self.cu_seqlens.diff().cpu()
        sums = torch.zeros(len(counts), dtype=torch.float64)
        sums.index_add_(0, ids, values.detach().double().cpu())  # on a CPU always: it adds in one order there
        return (sums / counts)[ids].to(values.device, values.dtype)


class LossConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A loss by name and its parameters; None takes the loss's own default.

    sft        -log pi
    reinforce  -A log pi
    ppo_clip   max(-rA, -clip(r, 1 - clip_low, 1 + clip_high) A), for A < 0 at most -dual_clip A (0: no such bound)
               (arXiv 1707.06347, dual clip 1912.09729)
    grpo       ppo_clip, mean over each sample first (2402.03300)
    dapo       ppo_clip, more room above, mean over all tokens (2503.14476)
    gspo       ppo_clip with the geometric mean of r over the sample in place of r (2507.18071)
    cispo      -sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi (2506.13585)
    sapo       -(4 / tau) sigmoid(tau (r - 1)) A, tau by the sign of A (2511.20347)
    dppo       -rA + log_ratio_penalty log^2 r; nothing where pi - mu is past max_probability_shift in A's direction

    `aggregation`: "token" is the mean over all loss tokens, "sequence" the mean over samples of their means,
    "constant" the sum over (samples x constant_length), whatever the lengths are (Dr. GRPO, 2503.20783).
    `kl_coefficient` adds KL(pi || reference), with d = log ref - log pi: k1 -d, k2 d^2 / 2, k3 exp(d) - d - 1.
    `entropy_coefficient` subtracts the entropy.

    Raises ConfigError for an unknown name, a parameter that the loss does not have, and values out of range.
    """

    name: str = "dapo"
    aggregation: str | None = None
    constant_length: int = 0
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    tau_positive: float | None = None
    tau_negative: float | None = None
    max_probability_shift: float | None = None
    log_ratio_penalty: float | None = None
    kl_coefficient: float = 0.0
    kl_estimator: str = "k3"
    entropy_coefficient: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in LOSSES:
            raise ConfigError(
                f'there is no loss "{self.name}"{nearest(self.name, list(LOSSES))}; there are {", ".join(LOSSES)}'
            )
        loss = LOSSES[self.name]
        for name in ("clip_low", "clip_high", "dual_clip", "tau_positive", "tau_negative", "max_probability_shift",
                     "log_ratio_penalty"):  # fmt: skip
            value = getattr(self, name)
            if value is None:
                msgspec.structs.force_setattr(self, name, loss.defaults.get(name))
            elif name not in loss.defaults:
                known = ", ".join(loss.defaults) or "no parameters"
                raise ConfigError(f'{name} has no effect on the loss "{self.name}", which has {known}; leave it out')
            elif not (math.isfinite(value) and value >= 0.0):
                raise ConfigError(f"LossConfig.{name} is {value}; it must be 0 or more, and finite")
        if self.tau_positive == 0.0 or self.tau_negative == 0.0:
            raise ConfigError("LossConfig.tau_positive and tau_negative divide; they must be above 0")
        if self.aggregation is None:
            msgspec.structs.force_setattr(self, "aggregation", loss.aggregation)
        if self.aggregation not in AGGREGATIONS:
            raise ConfigError(f'LossConfig.aggregation is "{self.aggregation}"; there are {", ".join(AGGREGATIONS)}')
        if self.aggregation == "constant" and self.constant_length < 1:
            raise ConfigError(
                'aggregation "constant" divides by LossConfig.constant_length; set it to the longest completion, '
                "SamplingParams.max_tokens"
            )
        if self.kl_estimator not in KL_ESTIMATORS:
            raise ConfigError(f'LossConfig.kl_estimator is "{self.kl_estimator}"; there are {", ".join(KL_ESTIMATORS)}')
        for name in ("kl_coefficient", "entropy_coefficient"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"LossConfig.{name} is {getattr(self, name)}; it must be finite")


Terms = tuple[Tensor, Tensor | None]  # loss per token [N]; bool [N] of tokens whose gradient was cut, or None


def sft(batch: LossBatch, config: LossConfig) -> Terms:
    return -batch.logprobs, None


def reinforce(batch: LossBatch, config: LossConfig) -> Terms:
    return -batch.advantages * batch.logprobs, None


def ppo_clip(batch: LossBatch, config: LossConfig) -> Terms:
    return _clipped_surrogate(batch.ratio(), batch.advantages, config)


def gspo(batch: LossBatch, config: LossConfig) -> Terms:
    frozen = batch.logprobs.detach()
    mean = batch.sequence_mean(frozen - batch.old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    # The value is the sample's ratio; the gradient reaches every token through its own log-probability.
    ratio = (batch.logprobs - frozen + mean).exp()
    return _clipped_surrogate(ratio, batch.advantages, config)


def cispo(batch: LossBatch, config: LossConfig) -> Terms:
    assert config.clip_low is not None and config.clip_high is not None, "filled in by LossConfig"
    ratio = batch.ratio().detach()
    weight = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    return -weight * batch.advantages * batch.logprobs, weight != ratio


def sapo(batch: LossBatch, config: LossConfig) -> Terms:
    assert config.tau_positive is not None and config.tau_negative is not None, "filled in by LossConfig"
    tau = torch.full_like(batch.advantages, config.tau_negative)
    tau = tau.masked_fill(batch.advantages > 0, config.tau_positive)
    return -(4.0 / tau) * torch.sigmoid(tau * (batch.ratio() - 1.0)) * batch.advantages, None


def dppo(batch: LossBatch, config: LossConfig) -> Terms:
    assert config.max_probability_shift is not None and config.log_ratio_penalty is not None, "filled in by LossConfig"
    shift = batch.logprobs.detach().exp() - batch.old_logprobs.exp()
    past_above = (batch.advantages > 0) & (shift > config.max_probability_shift)
    past_below = (batch.advantages <= 0) & (shift < -config.max_probability_shift)
    dropped = past_above | past_below
    losses = -batch.ratio() * batch.advantages
    losses = losses + config.log_ratio_penalty * (batch.logprobs - batch.old_logprobs).square()
    return losses.masked_fill(dropped, 0.0), dropped


def _clipped_surrogate(ratio: Tensor, advantages: Tensor, config: LossConfig) -> Terms:
    assert config.clip_low is not None and config.clip_high is not None, "filled in by LossConfig"
    free = -ratio * advantages
    losses = torch.maximum(free, -ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high) * advantages)
    if config.dual_clip:
        losses = torch.where(advantages < 0, torch.minimum(losses, -config.dual_clip * advantages), losses)
    # Inside the range the two branches are equal, and torch splits the gradient of a tie between both: still whole.
    return losses, losses.detach() != free.detach()


def kl_divergence(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """KL(pi || reference) per token, [N], from tokens of pi (J. Schulman, "Approximating KL divergence", 2020)."""
    d = ref_logprobs - logprobs
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d.square() / 2.0
    d = d.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(d) - d


@dataclass(frozen=True)
class NamedLoss:
    """One row of the table: the function, how it is summed by default, its own parameters and their defaults."""

    function: Callable[[LossBatch, LossConfig], Terms]
    aggregation: str
    defaults: dict[str, float]
    needs_old_logprobs: bool = True


LOSSES = {
    "sft": NamedLoss(sft, "token", {}, needs_old_logprobs=False),
    "reinforce": NamedLoss(reinforce, "token", {}, needs_old_logprobs=False),
    "ppo_clip": NamedLoss(ppo_clip, "token", {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0}),
    "grpo": NamedLoss(ppo_clip, "sequence", {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0}),
    "dapo": NamedLoss(ppo_clip, "token", {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}),
    "gspo": NamedLoss(gspo, "sequence", {"clip_low": 3e-4, "clip_high": 4e-4, "dual_clip": 0.0}),
    "cispo": NamedLoss(cispo, "token", {"clip_low": 1.0, "clip_high": 4.0}),  # weights in [0, 5]: no bound below
    "sapo": NamedLoss(sapo, "sequence", {"tau_positive": 1.0, "tau_negative": 1.05}),
    "dppo": NamedLoss(dppo, "token", {"max_probability_shift": 0.2, "log_ratio_penalty": 1e-3}),
}

LossFunction = Callable[[LossBatch], Tensor]


class Loss:
    """A loss ready for use, from a name, a `LossConfig` or a function of one's own.

    A function gets a `LossBatch` and returns a loss per token, [N], with a gradient; it is averaged over all loss
    tokens, and KL and entropy terms are its own affair.

    Raises ConfigError for an unknown name or something that is none of the three.
    """

    def __init__(self, loss: str | LossConfig | LossFunction) -> None:
        self.function: LossFunction | None = None
        if isinstance(loss, str):
            self.config = LossConfig(name=loss)
        elif isinstance(loss, LossConfig):
            self.config = loss
        elif callable(loss):
            self.function, self.config = loss, LossConfig(name="sft")  # of which only the aggregation is used
        else:
            raise ConfigError(f"a loss is a name, a LossConfig or a function, not {loss!r}")

    @property
    def name(self) -> str:
        return self.config.name if self.function is None else getattr(self.function, "__name__", "a function")

    @property
    def needs_old_logprobs(self) -> bool:
        return self.function is None and LOSSES[self.config.name].needs_old_logprobs

    @property
    def needs_ref_logprobs(self) -> bool:
        return self.function is None and self.config.kl_coefficient != 0.0

    def per_token(self, batch: LossBatch) -> Terms:
        """The loss of every token, [N], not yet weighted, and which tokens had their gradient cut (or None).

        Raises InputError when a function of one's own does not return [N] numbers with a gradient.
        """
        if self.function is not None:
            losses = self.function(batch)
            expected = tuple(batch.logprobs.shape)
            if not isinstance(losses, Tensor) or tuple(losses.shape) != expected or not losses.requires_grad:
                got = f"{tuple(losses.shape)}, requires_grad={losses.requires_grad}" if isinstance(
                    losses, Tensor) else repr(type(losses))  # fmt: skip
                raise InputError(
                    f"the loss {self.name} returned {got}; it must return a tensor {expected}, one loss per token, "
                    "computed from batch.logprobs or batch.entropy"
                )
            return losses, None
        config = self.config
        losses, cut = LOSSES[config.name].function(batch, config)
        if config.kl_coefficient != 0.0:
            kl = kl_divergence(batch.logprobs, batch.ref_logprobs, config.kl_estimator)
            losses = losses + config.kl_coefficient * kl
        if config.entropy_coefficient != 0.0:
            losses = losses - config.entropy_coefficient * batch.entropy
        return losses, cut

    def token_weights(self, batch: LossBatch) -> Tensor:
        """What each token's loss counts in the sum over the whole call, [N] float64."""
        config = self.config
        if config.aggregation == "sequence":
            per_sample = 1.0 / (batch.num_loss_samples * batch.cu_seqlens.diff().double())
            return per_sample[batch.sequence_ids]
        whole = batch.num_loss_tokens
        if config.aggregation == "constant":
            whole = batch.num_loss_samples * config.constant_length
        return torch.full_like(batch.logprobs, 1.0 / whole, dtype=torch.float64, requires_grad=False)


class LossMetrics:
    """Means and maxima over the loss tokens of a whole call, gathered micro-batch by micro-batch."""

    def __init__(self) -> None:
        self._sums: dict[str, list[tuple[float, int]]] = {}  # of each micro-batch: the sum and its number of terms
        self._maxima: dict[str, float] = {}

    @torch.no_grad()
    def add(self, batch: LossBatch, cut: Tensor | None) -> None:
        logprobs, entropy = batch.logprobs.detach(), batch.entropy.detach()
        self._add("entropy", entropy)
        if cut is not None:
            self._add("clip_fraction", cut)
        given = ~batch.old_logprobs.isnan()
        if given.any():
            ratio = batch.ratio().detach()[given]
            self._add("ratio_mean", ratio)
            self._maxima["ratio_max"] = max(self._maxima.get("ratio_max", 0.0), float(ratio.max()))
            # Tokens come from the old policy, so the estimate of KL(old || pi) has the roles of k3 exchanged.
            self._add("kl_old", kl_divergence(batch.old_logprobs[given], logprobs[given], "k3"))
        given = ~batch.ref_logprobs.isnan()
        if given.any():
            self._add("kl_ref", kl_divergence(logprobs[given], batch.ref_logprobs[given], "k3"))

    def _add(self, name: str, values: Tensor) -> None:
        self._sums.setdefault(name, []).append((float(values.sum(dtype=torch.float64)), values.numel()))

    def merge(self, other: LossMetrics) -> None:
        """Adds what another one has gathered, over other micro-batches of the same call."""
        for name, sums in other._sums.items():
            self._sums.setdefault(name, []).extend(sums)
        for name, value in other._maxima.items():
            self._maxima[name] = max(self._maxima.get(name, value), value)

    def result(self) -> dict[str, float]:
        """entropy, clip_fraction, ratio_mean, ratio_max, kl_old and kl_ref, as far as there is something to say.

        Sums of micro-batches are added up correctly rounded, so who ran which does not show."""
        means = {
            name: math.fsum(total for total, _ in sums) / sum(count for _, count in sums)
            for name, sums in self._sums.items()
        }
        return means | self._maxima
