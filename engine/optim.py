"""AdamW over fp32 master weights, clipping by the global norm, and learning-rate schedules."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from engine.config import OptimizerConfig
from engine.errors import ConfigError, InputError, NumericsError, nearest
from engine.kernels.adamw import adamw_, squared_norms
from engine.kernels.dtypes import wide_dtype
from engine.kernels.memory import zeros
from engine.kernels.weight import Weight
from engine.parallel.collectives import all_gather_object
from engine.parallel.ownership import Shares

SCHEDULES = ("constant", "cosine")
BUCKETS_UNDER_WAY = 2  # of updated weights: what they send and receive is memory beside the weights


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
    """What AdamW keeps of one block of rows: fp32 (float64 for float64), dense, in the block's own shape, on the
    weight's device."""

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class AdamW:
    """Decoupled weight decay (arXiv 1711.05101) with fp32 master weights, of the rows that this rank steps.

    `state` is made at the first step, so an engine that only samples pays nothing for it; its keys are the names of
    `weights`. `interrupted` is True when a step was broken off between two weights: nothing can be made of that state
    but to load an earlier one. Every rank makes the same calls.
    """

    def __init__(self, shares: Shares, config: OptimizerConfig) -> None:
        self.shares = shares
        self.config = config
        self.steps = 0
        self.state: dict[str, Moments] = {}
        self.interrupted = False

    @property
    def weights(self) -> list[Weight]:
        """This rank's blocks of rows, as weights that share the model's storage."""
        return self.shares.own

    def allocate(self) -> None:
        """Masters from the compute weights, moments at zero; does nothing when they are there already."""
        if self.state:
            return
        fresh = {}
        for weight in self.weights:
            dtype = wide_dtype(weight.dtype)
            master = weight.dense(dtype=dtype)
            first, second = (zeros(weight.shape, dtype, master.device) for _ in range(2))
            fresh[weight.name] = Moments(master, first, second)
        self.state = fresh

    def zero_grad(self) -> None:
        for weight in self.weights:
            weight.zero_grad()

    def step(self, rate: float) -> float:
        """Clips the gradients, steps, writes the compute weights in place on every rank, zeroes the gradients.

        Returns the norm before clipping. Squares are summed in float64 within fixed blocks of rows, and the blocks'
        sums are added up correctly rounded, so the norm has the same bits whoever holds which block. Raises InputError
        for a rate that is negative or not finite, and NumericsError, on every rank, when the norm is not finite: the
        step is then not taken and the gradients are dropped. Raises ParallelError.
        """
        if not (math.isfinite(rate) and rate >= 0.0):
            raise InputError(f"the learning rate is {rate}; it must be finite and 0 or more")
        norm = self._norm()
        limit = self.config.max_grad_norm
        scale = limit / norm if 0.0 < limit < norm else 1.0
        self.allocate()
        self.interrupted = True
        publishing: deque[Callable[[], None]] = deque()
        for bucket in self.shares.buckets:
            for weight in bucket.own:
                self._step(weight, rate, scale)
            publishing.append(self.shares.start_publishing(bucket))
            if len(publishing) > BUCKETS_UNDER_WAY:
                publishing.popleft()()
        for finish in publishing:
            finish()
        self.steps += 1
        self.interrupted = False
        self.zero_grad()
        return norm

    def _norm(self) -> float:
        """The norm of the whole gradient, the same on every rank."""
        counted = [weight for weight in self.weights if self.shares.is_counted(weight)]
        squares = squared_norms([weight.grad_buffer() for weight in counted])
        culprits = [w.name for w, square in zip(counted, squares, strict=True) if not math.isfinite(square)]
        everyone = all_gather_object((squares, culprits), self.shares.world)
        culprits = [name for _, names in everyone for name in names]
        total = math.inf if culprits else _sum(square for squares, _ in everyone for square in squares)
        if math.isfinite(total):
            return math.sqrt(total)
        self.zero_grad()
        raise NumericsError(
            f"the gradients of {len(culprits)} of {sum(len(squares) for squares, _ in everyone)} blocks of weights "
            f"are not finite, the first being {culprits[0] if culprits else 'none, only their sum'}; the step was not "
            "taken and the gradients were dropped: lower the learning rate, or look for infinite advantages or "
            "log-probabilities"
        )

    def _step(self, weight: Weight, rate: float, scale: float) -> None:
        moments, config = self.state[weight.name], self.config
        adamw_(
            weight,
            moments.master,
            moments.exp_avg,
            moments.exp_avg_sq,
            learning_rate=rate,
            beta1=config.beta1,
            beta2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay if weight.decay else 0.0,
            step=self.steps + 1,
            grad_scale=scale,
        )


def _sum(values: Iterable[float]) -> float:
    try:
        return math.fsum(values)
    except OverflowError:
        return math.inf
