"""Rollouts and runs on several ranks: each episode on one of them, the same rollouts and weights on all."""

from __future__ import annotations

import random
from dataclasses import fields
from typing import Any

import pytest

from engine import ChatTemplate, Engine, EngineConfig, ParallelConfig, SamplingParams
from rl.config import NewModelConfig
from rl.env import Environment, Problem, Step
from rl.fresh_model import write_fresh_model
from rl.rollout import Collector
from tests.parallel.pool import Pool
from tests.rl.toy import Dialogue

SMALL = NewModelConfig(
    hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    head_dim=16, max_position_embeddings=128, initializer_range=0.1,
)  # fmt: skip
SMALL_ENGINE = {"kv_tokens": 4096, "train_batch_tokens": 1024, "threads": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model") / "fresh"
    write_fresh_model(directory, SMALL, ["0123456789+="], seed=0)
    return str(directory)


class Judge(Environment):
    """Rewards at random, poses a problem that cannot be posed, and raises: a run must not depend on which rank asks."""

    asked = 0

    def problem(self, index: int, seed: int, held_out: bool = False) -> Problem:
        return Problem([{"role": "user", "content": f"{index % 10}"}], thinking=False)

    async def score(self, problem: Problem, action: Any) -> Step:
        self.asked += 1
        if random.random() < 0.2:
            raise ValueError("no opinion")
        return Step(random.random(), info={"mood": random.random()})


def collected(model: str, parallel: ParallelConfig, environment: str) -> tuple[list[dict[str, Any]], int]:
    """All rollouts as plain data, without what belongs to a rank, and how many episodes ran here."""
    engine = Engine.from_pretrained(model, EngineConfig(parallel=parallel, **SMALL_ENGINE))
    env = Judge() if environment == "judge" else Dialogue()
    collector = Collector(engine, env, ChatTemplate.from_pretrained(model))
    problems = [env.problem(index, 0) for index in range(3)]
    groups = collector.collect(problems, 4, SamplingParams(max_tokens=40), seed=5)
    rollouts = [rollout for group in groups for rollout in group]
    plain = [{f.name: getattr(r, f.name) for f in fields(r) if f.name != "episode"} for r in rollouts]
    mine = sum(rollout.episode is not None for rollout in rollouts)
    collector.close()
    engine.close()
    return plain, mine


@pytest.mark.parametrize("environment", ["judge", "dialogue"])
def test_each_episode_runs_on_one_rank_and_all_have_the_same_rollouts(
    pool2: Pool, model: str, environment: str
) -> None:
    (first, ran), (second, ran_there) = pool2.run(collected, model, ParallelConfig(dp=2), environment)
    assert first == second
    assert ran == ran_there == 6


def test_rollouts_of_a_sure_environment_are_those_of_one_rank(pool2: Pool, model: str) -> None:
    alone, _ = collected(model, ParallelConfig(), "dialogue")
    assert pool2.run(collected, model, ParallelConfig(dp=2), "dialogue")[0][0] == alone
