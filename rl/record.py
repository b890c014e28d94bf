"""What a step leaves behind: a line of metrics, and now and then its rollouts, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from engine import StepStats, Tokenizer, TrainStats
from rl.batch import Batch
from rl.rollout import Rollout

if TYPE_CHECKING:
    from rl.run import Run


def step_record(
    run: Run, batch: Batch, stats: TrainStats | None, update: StepStats | None, difference: float
) -> dict[str, Any]:
    """The metrics of a step. Rates and means that have nothing to stand on (a step that trained nothing) are None."""
    finished = batch.finished()
    rewards = [rollout.reward for rollout in finished]
    sampled = sum(rollout.num_sampled for rollout in finished)
    record: dict[str, Any] = {
        "step": run.step,
        "reward": fmean(rewards) if rewards else None,
        "reward_std": pstdev(rewards) if rewards else None,
        "completion_tokens": fmean(rollout.num_sampled for rollout in finished) if finished else None,
        "entropy": stats.metrics.get("entropy") if stats else None,
        "loss": stats.loss if stats else None,
        "gradient_norm": update.grad_norm if update else None,
        "learning_rate": update.learning_rate if update else None,
        "max_abs_logprob_difference": difference,
        "checked_tokens": sum(r.num_sampled for r in (finished if run.config.check_filtered else batch.trained)),
        "rollout_tokens": sampled,
        "train_tokens": stats.num_tokens if stats else 0,
        "truncated": sum(rollout.finish_reason == "length" for rollout in finished),
        "weight_version": run.engine.weight_version,
        "weight_bytes_moved": run.weight_bytes_moved(),
        "seconds": run.take_seconds(),
    }
    record |= batch.counts()
    names = sorted({name for rollout in finished for name in rollout.info})
    record |= {f"env/{name}": fmean(r.info[name] for r in finished if name in r.info) for name in names}
    return record


def rollout_record(step: int, rollout: Rollout, tokenizer: Tokenizer) -> dict[str, Any]:
    """A rollout for the report: the text of each token, its log-probability and its advantage."""
    given = rollout.token_advantages or [rollout.advantage] * len(rollout.tokens)
    return {
        "step": step,
        "group": rollout.group,
        "reward": rollout.reward,
        "thinking": rollout.problem.thinking,
        "finish_reason": rollout.finish_reason,
        "failure": None if rollout.failure is None else f"{rollout.failure.boundary.value}: {rollout.failure.reason}",
        "pieces": [tokenizer.decode([token], skip_special_tokens=False) for token in rollout.tokens],
        "written": rollout.loss_mask,
        "logprobs": _rounded(rollout.logprobs),
        "advantages": _rounded(given + [0.0] * (len(rollout.tokens) - len(given))),
    }


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]
