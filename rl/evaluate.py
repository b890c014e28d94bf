"""Pass@1 on held-out problems. A rollout that fails stops the evaluation; it never counts as a wrong answer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine import SamplingParams
from rl.config import EvaluationConfig
from rl.env import RolloutError
from rl.rollout import Collector, derive_seed


@dataclass(frozen=True)
class Evaluation:
    """`accuracy` is the mean reward: pass@1 averaged over samples, for an environment that rewards 1 or 0.
    `standard_error` is over problems; `mean_tokens` counts what the model wrote."""

    thinking: bool
    accuracy: float
    standard_error: float
    mean_tokens: float
    problems: int
    samples: int


def evaluate(collector: Collector, config: EvaluationConfig, thinking: bool) -> Evaluation:
    """Answers the same held-out problems, from the same seeds, at every call. Raises RolloutError."""
    problems = [collector.env.problem(index, config.seed, held_out=True) for index in range(config.problems)]
    params = SamplingParams(max_tokens=config.max_tokens, temperature=config.temperature)
    groups = collector.collect(
        [replace(problem, thinking=thinking) for problem in problems],
        config.samples,
        params,
        derive_seed(config.seed, "evaluation", thinking),
    )
    for number, group in enumerate(groups):
        for rollout in group:
            if rollout.failure is not None:
                raise RolloutError(
                    f"problem {number} of the evaluation failed at the {rollout.failure.boundary.value} boundary: "
                    f"{rollout.failure.reason}; a failure is not a wrong answer, so there is no score"
                )
    means = [sum(rollout.reward for rollout in group) / len(group) for group in groups]
    accuracy = sum(means) / len(means)
    variance = sum((mean - accuracy) ** 2 for mean in means) / max(1, len(means) - 1)
    written = [rollout.num_sampled for group in groups for rollout in group]
    return Evaluation(
        thinking=thinking,
        accuracy=accuracy,
        standard_error=(variance / len(means)) ** 0.5,
        mean_tokens=sum(written) / len(written),
        problems=len(problems),
        samples=config.samples,
    )
