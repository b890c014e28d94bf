"""Sums: the model adds two numbers, after thinking or at once, and is right or wrong."""

from __future__ import annotations

import hashlib
import random

from engine import ConfigError
from rl.env import Action, Environment, Problem, Step


class Arithmetic(Environment):
    """Operands of `min_digits` to `max_digits` digits, each count as likely; one problem in `held_out_every` is held
    out. Reward 1 for the sum in the format of the mode (`<think>trace</think>sum`, or the sum alone), else 0.

    `thinking_share` of the training problems ask for a thought.
    """

    def __init__(
        self, min_digits: int = 2, max_digits: int = 3, held_out_every: int = 10, thinking_share: float = 1.0
    ) -> None:
        if not 1 <= min_digits <= max_digits <= 18:
            raise ConfigError(f"operands of {min_digits} to {max_digits} digits: it takes 1 <= min <= max <= 18")
        if held_out_every < 2:
            raise ConfigError(f"held_out_every is {held_out_every}; it must be at least 2, or nothing could be trained")
        if not 0.0 <= thinking_share <= 1.0:
            raise ConfigError(f"thinking_share is {thinking_share}; it is a share, from 0 to 1")
        self.min_digits, self.max_digits = min_digits, max_digits
        self.held_out_every, self.thinking_share = held_out_every, thinking_share

    def problem(self, index: int, seed: int, held_out: bool = False) -> Problem:
        draw = random.Random(f"{seed}/{index}/{held_out}")
        while True:
            left, right = self._operand(draw), self._operand(draw)
            question = f"{left}+{right}="
            if self.is_held_out(question) == held_out:
                thinking = draw.random() < self.thinking_share
                return Problem([{"role": "user", "content": question}], str(left + right), thinking)

    def is_held_out(self, question: str) -> bool:
        """Whether a question belongs to the held-out split: a hash, so that no digit of the sum gives it away."""
        return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") % self.held_out_every == 0

    async def score(self, problem: Problem, action: Action) -> Step:
        opened, thought, answer = _parts(action.text)
        well_formed = action.finish_reason == "stop" and opened == problem.thinking
        correct = well_formed and answer == problem.data
        return Step(float(correct), info={"well_formed": float(well_formed), "thought_characters": float(len(thought))})

    def _operand(self, draw: random.Random) -> int:
        digits = draw.randint(self.min_digits, self.max_digits)
        return draw.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)


def _parts(text: str) -> tuple[bool, str, str]:
    """Whether a text is one complete thought and an answer; the thought; the answer (all of it when there is none)."""
    if text.startswith("<think>") and text.count("<think>") == text.count("</think>") == 1:
        thought, _, answer = text.removeprefix("<think>").partition("</think>")
        return True, thought, answer
    return False, "", text
