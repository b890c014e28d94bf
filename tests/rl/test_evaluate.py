"""Evaluation: the same problems every time, and a failure is no score."""

import pytest

from rl.config import EvaluationConfig
from rl.env import RolloutError
from rl.evaluate import evaluate
from tests.rl.toy import Broken, Letters

CONFIG = EvaluationConfig(problems=6, samples=2, max_tokens=5)


def test_evaluation_is_a_function_of_the_weights(collector):
    assert evaluate(collector(Letters()), CONFIG, thinking=True) == evaluate(
        collector(Letters()), CONFIG, thinking=True
    )


def test_accuracy_is_the_mean_reward_over_problems_and_samples(collector):
    collect = collector(Letters())
    seen = []
    score = collect.env.score

    async def scored(problem, action):
        seen.append(await score(problem, action))
        return seen[-1]

    collect.env.score = scored
    result = evaluate(collect, CONFIG, thinking=False)
    assert len(seen) == 12 and result.accuracy == pytest.approx(sum(seen) / 12)


def test_both_modes_are_asked_of_the_same_problems(collector):
    collect = collector(Letters())
    asked = {True: [], False: []}

    async def score(problem, action):
        asked[problem.thinking].append(problem.messages)
        return 0.0

    collect.env.score = score
    for thinking in (True, False):
        evaluate(collect, CONFIG, thinking)
    assert asked[True] == asked[False] != []


def test_a_failed_rollout_stops_the_evaluation(collector):
    with pytest.raises(
        RolloutError, match=r"problem 0 of the evaluation failed at the environment boundary.*no such sum"
    ):
        evaluate(collector(Broken()), CONFIG, thinking=True)
