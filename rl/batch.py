"""From groups of rollouts to a training batch: advantages, filters, and the account of every rollout launched."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from engine import Engine, EngineError, ExactnessError, Sample, TrainStats
from rl.advantage import advantages
from rl.config import TrainConfig
from rl.rollout import Rollout


@dataclass
class Batch:
    """What became of the rollouts of a step. Every one is in exactly one list."""

    trained: list[Rollout] = field(default_factory=list)
    filtered: list[Rollout] = field(default_factory=list)  # of groups whose rewards are all equal
    errored: list[Rollout] = field(default_factory=list)  # failed; each says why
    stale: list[Rollout] = field(default_factory=list)  # sampled from other weights than these

    def counts(self) -> dict[str, int]:
        """How many are in each list, and `launched`, their sum."""
        counts = {name: len(getattr(self, name)) for name in ("trained", "filtered", "errored", "stale")}
        return counts | {"launched": sum(counts.values())}

    def finished(self) -> list[Rollout]:
        """Those with a reward."""
        return self.trained + self.filtered


def select(groups: list[list[Rollout]], config: TrainConfig, weight_version: int) -> Batch:
    """Sorts rollouts into trained, filtered, errored and stale, and sets the advantage of each trained one.

    The group of a failed rollout goes on without it; advantages given by the environment need no group.
    """
    batch = Batch()
    kept: list[list[Rollout]] = []
    for group in groups:
        usable = []
        for rollout in group:
            if rollout.failure is not None:
                batch.errored.append(rollout)
            elif rollout.weight_version != weight_version:
                batch.stale.append(rollout)
            else:
                usable.append(rollout)
        rewards = {shaped_reward(rollout, config) for rollout in usable}
        if len(rewards) > 1 or any(rollout.token_advantages for rollout in usable):
            kept.append(usable)
        else:
            batch.filtered += usable
    rewards_by_group = [[shaped_reward(rollout, config) for rollout in group] for group in kept]
    if kept:
        values = advantages(config.advantage, rewards_by_group, config.scale_by_batch_std)
        for group, group_values in zip(kept, values, strict=True):
            for rollout, value in zip(group, group_values, strict=True):
                rollout.advantage = value
                batch.trained.append(rollout)
    return batch


def shaped_reward(rollout: Rollout, config: TrainConfig) -> float:
    """The reward less the soft overlong penalty: 0 until `overlong_tokens` before `max_tokens`, then linearly to 1
    (DAPO, arXiv 2503.14476)."""
    if not config.overlong_tokens:
        return rollout.reward
    over = rollout.num_sampled - (config.max_tokens - config.overlong_tokens)
    return rollout.reward - min(1.0, max(0.0, over / config.overlong_tokens))


def to_sample(rollout: Rollout, temperature: float) -> Sample:
    """The rollout as the trainer takes it: the ids that were sampled, with the log-probabilities they had."""
    given = rollout.token_advantages
    per_token = None if given is None else given + [0.0] * (len(rollout.tokens) - len(given))
    return Sample(
        tokens=rollout.tokens,
        loss_mask=rollout.loss_mask,
        advantages=rollout.advantage if per_token is None else per_token,
        old_logprobs=rollout.logprobs,
        temperature=temperature,
        weight_version=rollout.weight_version,
    )


def max_difference(rollouts: list[Rollout], trained_logprobs: list[torch.Tensor]) -> float:
    """The largest |log p sampled - log p trained| over all tokens the model wrote: 0, or ExactnessError is raised and
    names the first token that differs (a NaN differs).

    `trained_logprobs[r]` is float32 [len - 1], entry i - 1 for token i.
    """
    largest = 0.0
    for number, (rollout, logprobs) in enumerate(zip(rollouts, trained_logprobs, strict=True)):
        written = torch.tensor(rollout.loss_mask[1:], dtype=torch.bool)
        trained = logprobs[written]
        sampled = torch.tensor(rollout.logprobs[1:], dtype=torch.float32)[written]
        if not torch.equal(trained, sampled):
            row = int((trained != sampled).nonzero()[0])
            at = int(written.nonzero()[row]) + 1
            raise ExactnessError(
                f"token {at} (id {rollout.tokens[at]}) of rollout {number} was sampled at log-probability "
                f"{float(sampled[row])!r} but is trained at {float(trained[row])!r}: the sampler and the trainer do "
                "not run the same arithmetic, and the gradient would be that of another policy; "
                "`python -m engine ops` lists the kernels in use and whether each is exact"
            )
        if len(trained):
            largest = max(largest, float((trained - sampled).abs().max()))
    return largest


def check_exact(engine: Engine, batch: Batch, stats: TrainStats | None, config: TrainConfig) -> float:
    """Holds the log-probabilities of the trained rollouts against those of the gradient step, and, where configured,
    of the filtered ones against a scoring pass. Call it before the optimizer changes the weights.

    Returns max |delta log p|. Raises ExactnessError.
    """
    largest = 0.0
    if stats is not None:
        largest = max_difference(batch.trained, stats.logprobs)
        if stats.max_abs_logprob_difference != 0.0:
            raise ExactnessError(f"the trainer saw max |delta log p| = {stats.max_abs_logprob_difference}, not 0")
    if config.check_filtered and batch.filtered:
        scored = engine.score([rollout.tokens for rollout in batch.filtered], config.temperature)
        largest = max(largest, max_difference(batch.filtered, scored))
    return largest


def require_progress(batch: Batch) -> None:
    """Raises EngineError when every rollout of a step failed: that is a broken environment, not a hard problem."""
    counts = batch.counts()
    if counts["errored"] == counts["launched"]:
        failure = batch.errored[0].failure
        assert failure is not None, "an errored rollout has a failure"
        raise EngineError(
            f"all {counts['launched']} rollouts of the step failed; the first at the {failure.boundary.value} "
            f"boundary: {failure.reason}"
        )
