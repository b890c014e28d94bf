"""What an environment is: it poses problems, answers turns, and gives rewards. Awaited, because some have to wait.

Tokens in, tokens out: the loop never re-renders a turn that the model wrote. The ids sampled are the ids trained on;
an observation is appended to them as new ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from importlib import import_module
from typing import Any, Protocol

from engine import ConfigError, EngineError

Messages = list[dict[str, Any]]


class RolloutError(EngineError):
    """A rollout that failed where no failure may be counted as an answer, as in an evaluation."""


class Boundary(StrEnum):
    """Where a failed rollout broke: between the loop and ..."""

    PROMPT = "prompt"  # ... the template or the tokenizer: the problem did not become a prompt that fits
    SAMPLING = "sampling"  # ... the engine: the completion was aborted
    ENVIRONMENT = "environment"  # ... the environment: reset or step raised or took too long


@dataclass(frozen=True)
class Failure:
    """A failed rollout is data: which boundary it broke at, and why. Its group goes on without it."""

    boundary: Boundary
    reason: str


@dataclass(frozen=True)
class Problem:
    """One problem. `messages` is what the model sees; `data` is what the environment scores with; `thinking` is the
    mode that the chat template is asked for."""

    messages: Messages
    data: Any = None
    thinking: bool = True


@dataclass(frozen=True)
class Action:
    """What the model wrote in a turn. `text` is decoded with special tokens, so that <think> tags can be seen; the
    stop token is not part of it."""

    text: str
    token_ids: list[int]
    finish_reason: str  # "stop" | "length"


@dataclass(frozen=True)
class Step:
    """The environment's answer to an action, as in Gymnasium: `terminated` by the task, `truncated` by a limit.

    `observation` is the text appended before the next turn (ignored after the last). `token_advantages`, one per
    token of the action, take the place of group advantages where given.
    """

    reward: float
    terminated: bool = True
    truncated: bool = False
    observation: str = ""
    info: dict[str, float] = field(default_factory=dict)
    token_advantages: list[float] | None = None


class Episode(Protocol):
    """One attempt at one problem."""

    async def reset(self) -> Messages:
        """The messages to begin with."""

    async def step(self, action: Action) -> Step:
        """What follows from the model's turn."""


class Environment:
    """Base of environments. A single-turn one gives `problem` and `score`; others override `episode` as well.

    Construction takes the keys of the configuration's `[env.arguments]`. `timeout_seconds` bounds each reset and step.
    """

    timeout_seconds: float = 60.0

    def problem(self, index: int, seed: int, held_out: bool = False) -> Problem:
        """Problem `index` of the sequence `seed`: a function of the two alone. Held-out ones are never trained on."""
        raise TypeError(f"{type(self).__name__} does not define problem(index, seed, held_out)")

    def is_held_out(self, question: str) -> bool:
        """Whether a user's message poses a held-out problem; supervised training leaves those conversations out."""
        return False

    async def score(self, problem: Problem, action: Action) -> float | Step:
        """The reward of a single-turn answer, or a whole `Step` when there is more to say than a number."""
        raise TypeError(f"{type(self).__name__} defines neither score nor an episode of its own")

    def episode(self, problem: Problem) -> Episode:
        """A fresh attempt at `problem`."""
        return SingleTurn(self, problem)


class SingleTurn:
    """The episode of an environment that only scores: one turn, one reward."""

    def __init__(self, env: Environment, problem: Problem) -> None:
        self.env = env
        self.problem = problem

    async def reset(self) -> Messages:
        return self.problem.messages

    async def step(self, action: Action) -> Step:
        scored = await self.env.score(self.problem, action)
        return scored if isinstance(scored, Step) else Step(float(scored))


def make_environment(name: str, arguments: dict[str, Any]) -> Environment:
    """The environment `name`: a file of `rl/envs` ("arithmetic") or "module:Class".

    Raises ConfigError for a name that cannot be imported, a class that is no Environment, arguments it does not take.
    """
    module_name, colon, class_name = name.partition(":")
    if not colon:
        module_name, class_name = f"rl.envs.{name}", name.title().replace("_", "")
    try:
        kind = getattr(import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f'environment "{name}" cannot be loaded ({error}); give a file of rl/envs, or "module:Class"'
        ) from None
    if not (isinstance(kind, type) and issubclass(kind, Environment)):
        raise ConfigError(f'"{name}" is not a subclass of rl.env.Environment')
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ConfigError(f'environment "{name}" does not take these arguments: {error}') from None
