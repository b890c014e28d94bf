"""AdamW over fp32 master weights, clipping by the global norm, and learning-rate schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from engine.config import OptimizerConfig
from engine.errors import ConfigError, InputError, NumericsError, nearest
from engine.kernels.adamw import adamw_, squared_norm
from engine.kernels.dtypes import wide_dtype
from engine.kernels.memory import zeros
from engine.kernels.weight import Weight

SCHEDULES = ("constant", "cosine")


def learning_rate(
    step: int, base: float, warmup: int = 0, total: int = 0, kind: str = "constant", min_ratio: float = 0.0
) -> float:
    """The rate of step `step` (the first is 0): linear warm-up over `warmup` steps to `base`, then the schedule.

    "constant" stays at `base`; "cosine" falls to `min_ratio * base` at step `total` (arXiv 1608.03983, no restarts)
    and stays there.

    Raises ConfigError for an unknown kind, negative numbers, and a cosine that would end before the warm-up does.
    """
    if kind not in SCHEDULES:
        raise ConfigError(f'there is no schedule "{kind}"{nearest(kind, list(SCHEDULES))}; use {", ".join(SCHEDULES)}')
    if step < 0 or warmup < 0 or not (math.isfinite(base) and base >= 0.0) or not 0.0 <= min_ratio <= 1.0:
        raise ConfigError(
            f"learning rate schedule with step {step}, warmup {warmup}, base {base}, min_ratio {min_ratio}: steps and "
            "base must be 0 or more, and min_ratio between 0 and 1"
        )
    if kind == "cosine" and total <= warmup:
        raise ConfigError(f"a cosine schedule over {total} steps has no room after {warmup} steps of warm-up")
    if step < warmup:
        return base * (step + 1) / warmup
    if kind == "constant":
        return base
    progress = min(1.0, (step - warmup) / (total - warmup))
    return base * (min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress)))


@dataclass
class Moments:
    """What AdamW keeps of one weight: fp32 (float64 for float64), dense, in the weight's own shape."""

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class AdamW:
    """Decoupled weight decay (arXiv 1711.05101) with fp32 master weights.

    `state` is made at the first step, so an engine that only samples pays nothing for it. `interrupted` is True when a
    step was broken off between two weights: nothing can be made of that state but to load an earlier one.
    """

    def __init__(self, weights: list[Weight], config: OptimizerConfig) -> None:
        self.weights = weights
        self.config = config
        self.steps = 0
        self.state: dict[str, Moments] = {}
        self.interrupted = False

    def allocate(self) -> None:
        """Masters from the compute weights, moments at zero; does nothing when they are there already."""
        if self.state:
            return
        fresh = {}
        for weight in self.weights:
            dtype = wide_dtype(weight.dtype)
            master = weight.dense(dtype=dtype)
            fresh[weight.name] = Moments(master, zeros(weight.shape, dtype), zeros(weight.shape, dtype))
        self.state = fresh

    def zero_grad(self) -> None:
        for weight in self.weights:
            weight.zero_grad()

    def step(self, rate: float) -> float:
        """Clips the gradients, steps, writes the compute weights in place, zeroes the gradients.

        Returns the norm before clipping. The squares are summed in float64 weight by weight in a fixed order, so the
        norm has the same bits in every run. Raises InputError for a rate that is negative or not finite, and
        NumericsError when the norm is not finite: the step is then not taken and the gradients are dropped.
        """
        if not (math.isfinite(rate) and rate >= 0.0):
            raise InputError(f"the learning rate is {rate}; it must be finite and 0 or more")
        norms = [squared_norm(weight.grad_buffer()) for weight in self.weights]
        norm = math.sqrt(sum(norms)) if math.isfinite(sum(norms)) else math.nan
        if math.isnan(norm):
            culprits = [w.name for w, n in zip(self.weights, norms, strict=True) if not math.isfinite(n)]
            self.zero_grad()
            raise NumericsError(
                f"the gradients of {len(culprits)} of {len(self.weights)} weights are not finite, the first being "
                f"{culprits[0] if culprits else 'none, only their sum'}; the step was not taken and the gradients were "
                "dropped: lower the learning rate, or look for infinite advantages or log-probabilities"
            )
        limit = self.config.max_grad_norm
        scale = limit / norm if 0.0 < limit < norm else 1.0
        self.allocate()
        self.interrupted = True
        for weight in self.weights:
            moments = self.state[weight.name]
            adamw_(
                weight,
                moments.master,
                moments.exp_avg,
                moments.exp_avg_sq,
                learning_rate=rate,
                beta1=self.config.beta1,
                beta2=self.config.beta2,
                eps=self.config.eps,
                weight_decay=self.config.weight_decay if weight.decay else 0.0,
                step=self.steps + 1,
                grad_scale=scale,
            )
        self.steps += 1
        self.interrupted = False
        self.zero_grad()
        return norm
