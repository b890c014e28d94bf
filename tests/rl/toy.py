"""Small environments for the tests."""

import asyncio

from rl.env import Environment, Problem, Step


class Letters(Environment):
    """Reward: the share of letters "a" in what was written. Learnable within a few steps from random weights."""

    def problem(self, index, seed, held_out=False):
        return Problem([{"role": "user", "content": f"{index % 10}"}], thinking=False)

    async def score(self, problem, action):
        return action.text.count("a") / max(1, len(action.token_ids))


class Broken(Letters):
    """Breaks in the way that its problem's number, modulo 4, says: raises, hangs, poses what is no message, or not."""

    timeout_seconds = 0.05

    def problem(self, index, seed, held_out=False):
        content = 7 if index % 4 == 2 else f"{index % 4}"
        return Problem([{"role": "user", "content": content} if content != 7 else {"role": 7}], data=index % 4)

    async def score(self, problem, action):
        if problem.data == 0:
            raise ValueError("no such sum")
        if problem.data == 1:
            await asyncio.sleep(60.0)
        return float(len(action.token_ids))


class Dialogue(Environment):
    """Two turns. What was said is kept in `heard`, the second observation quotes nothing."""

    def problem(self, index, seed, held_out=False):
        return Problem([{"role": "user", "content": "hi"}], thinking=False)

    def episode(self, problem):
        return DialogueEpisode(problem)


class DialogueEpisode:
    def __init__(self, problem):
        self.problem, self.heard = problem, []

    async def reset(self):
        return self.problem.messages

    async def step(self, action):
        self.heard.append(action)
        last = len(self.heard) == 2
        return Step(
            reward=1.0,
            terminated=last,
            observation="go on",
            info={"turns": 1.0},
            token_advantages=[float(len(self.heard))] * len(action.token_ids),
        )
