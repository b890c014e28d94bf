"""Rollouts: problems become prompts, the engine samples turns, the environment answers and rewards them.

Where there are several ranks, each episode runs on one of them, which tells the others what came of it: an environment
may be slow, or answer differently each time, and all ranks go on with the same rollouts.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from engine import ChatTemplate, Completion, Engine, EngineError, InputError, SamplingParams
from rl.env import Action, Boundary, Environment, Episode, Failure, Messages, Problem, Step

T = TypeVar("T")
TURN = "\ue000"  # a private-use character that stands for the model's turn while a template is rendered


@dataclass(frozen=True)
class Outcome:
    """What a turn of the environment made of a rollout, for the ranks where it did not run."""

    number: int
    history: Messages
    prompt: list[int]  # ids for the model's next turn
    reward: float
    info: dict[str, float]
    token_advantages: list[float] | None
    failure: Failure | None
    done: bool


@dataclass
class Rollout:
    """One attempt at a problem. `tokens`, `loss_mask`, `logprobs` and `token_advantages` are per token and as long as
    the whole context; `loss_mask` is 1 on what the model wrote, and log-probabilities elsewhere are 0."""

    number: int  # among those that are collected together
    group: int
    problem: Problem
    episode: Episode | None = None  # on the rank where it runs, once it has begun
    history: Messages = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    token_advantages: list[float] | None = None
    advantage: float = 0.0
    reward: float = 0.0
    info: dict[str, float] = field(default_factory=dict)
    turns: int = 0
    finish_reason: str = ""
    weight_version: int = -1
    failure: Failure | None = None
    done: bool = False

    @property
    def num_sampled(self) -> int:
        """Tokens that the model wrote."""
        return sum(self.loss_mask)

    def fail(self, boundary: Boundary, reason: object) -> None:
        """Ends the rollout as a failure."""
        text = f"{type(reason).__name__}: {reason}" if isinstance(reason, BaseException) else str(reason)
        self.failure, self.done = Failure(boundary, text), True

    def extend(self, token_ids: list[int], mask: int, logprobs: list[float] | None = None) -> None:
        """Appends ids of one origin: the model's (mask 1, with log-probabilities) or others'."""
        self.tokens += token_ids
        self.loss_mask += [mask] * len(token_ids)
        self.logprobs += logprobs or [0.0] * len(token_ids)

    def outcome(self, known: int) -> Outcome:
        """What there is to tell, to those who know the first `known` tokens."""
        return Outcome(self.number, self.history, self.tokens[known:], self.reward, self.info, self.token_advantages,
                       self.failure, self.done)  # fmt: skip

    def adopt(self, outcome: Outcome) -> None:
        """Takes in what another rank tells."""
        self.history, self.reward, self.info = outcome.history, outcome.reward, outcome.info
        self.token_advantages, self.failure, self.done = outcome.token_advantages, outcome.failure, outcome.done
        self.extend(outcome.prompt, 0)


def derive_seed(*parts: int | str) -> int:
    """A seed that is a function of its parts alone: 62 bits, the same on every machine."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 2


class Collector:
    """Runs groups of rollouts on one engine. `seconds` says how long sampling and the environment took so far."""

    def __init__(self, engine: Engine, env: Environment, template: ChatTemplate, max_prompt_tokens: int = 2048,
                 max_turns: int = 16) -> None:  # fmt: skip
        if engine.tokenizer is None:
            raise EngineError("the model has no tokenizer.json; an environment speaks text, so rollouts need one")
        self.engine, self.env, self.template = engine, env, template
        # One token at least must be left to sample, in the context and in the KV pool.
        limit = min(engine.model.config.max_position_embeddings, engine.config.kv_tokens) - 1
        self.max_prompt_tokens, self.max_turns = min(max_prompt_tokens, limit), max_turns
        self.tokenizer = engine.tokenizer
        self.eos = engine.model.config.eos_token_ids
        self.seconds = {"rollout": 0.0, "scoring": 0.0}
        self._loop = asyncio.new_event_loop()  # one for all steps: an environment may keep connections open

    def close(self) -> None:
        """Ends the event loop."""
        self._loop.close()

    def collect(
        self, problems: Sequence[Problem], group_size: int, params: SamplingParams, seed: int, first_group: int = 0
    ) -> list[list[Rollout]]:
        """`group_size` rollouts of each problem, [P][G]: a function of the weights and `seed`. Groups are numbered from
        `first_group`."""
        groups = [
            [Rollout(place * group_size + member, first_group + place, problem) for member in range(group_size)]
            for place, problem in enumerate(problems)
        ]
        rollouts = [rollout for group in groups for rollout in group]
        self._environment(rollouts, self._reset)
        for turn in range(self.max_turns):
            alive = [rollout for rollout in rollouts if not rollout.done]
            if not alive:
                break
            actions = self._sample(alive, params, derive_seed(seed, turn))
            acting = [rollout for rollout in alive if rollout.number in actions]
            self._environment(acting, lambda rollout: self._step(rollout, actions[rollout.number]))  # noqa: B023
        return groups

    # ---- the model's turn ----

    def _sample(self, alive: list[Rollout], params: SamplingParams, seed: int) -> dict[int, Action]:
        """One turn of each, by number. Rollouts of a group with the same context are sampled as one prompt with n."""
        start = time.perf_counter()
        contexts: dict[tuple[int, tuple[int, ...]], list[Rollout]] = {}
        for rollout in alive:
            contexts.setdefault((rollout.group, tuple(rollout.tokens)), []).append(rollout)
        each = [
            SamplingParams(n=len(members), max_tokens=params.max_tokens, temperature=params.temperature,
                           top_p=params.top_p, top_k=params.top_k, seed=seed)
            for members in contexts.values()
        ]  # fmt: skip
        results = self.engine.generate([list(tokens) for _, tokens in contexts], each)
        self.seconds["rollout"] += time.perf_counter() - start
        taken: dict[int, Action] = {}
        for members, completions in zip(contexts.values(), results, strict=True):
            for rollout, completion in zip(members, completions, strict=True):
                if completion.finish_reason == "abort":
                    rollout.fail(Boundary.SAMPLING, "the completion was aborted")
                else:
                    taken[rollout.number] = self._take(rollout, completion)
        return taken

    def _take(self, rollout: Rollout, completion: Completion) -> Action:
        rollout.extend(completion.token_ids, 1, completion.logprobs.tolist())
        rollout.turns += 1
        rollout.finish_reason = completion.finish_reason
        rollout.weight_version = completion.weight_version
        ended = completion.token_ids[-1:] and completion.token_ids[-1] in self.eos
        written = completion.token_ids[:-1] if ended else completion.token_ids
        text = self.tokenizer.decode(written, skip_special_tokens=False)
        return Action(text, completion.token_ids, completion.finish_reason)

    # ---- the environment's turn ----

    def _environment(self, rollouts: list[Rollout], turn: Callable[[Rollout], Coroutine[Any, Any, None]]) -> None:
        """A turn of each, on the rank whose episode it is; every rank knows what came of all."""
        start, ranks = time.perf_counter(), self.engine.ranks
        by_number = {rollout.number: rollout for rollout in rollouts}
        mine = [rollout for rollout in rollouts if rollout.number % ranks.count == ranks.index]
        known = [len(rollout.tokens) for rollout in mine]
        self._loop.run_until_complete(_all(turn(rollout) for rollout in mine))
        told = ranks.gather([rollout.outcome(size) for rollout, size in zip(mine, known, strict=True)])
        for rank, outcomes in enumerate(told):
            for outcome in outcomes if rank != ranks.index else []:
                by_number[outcome.number].adopt(outcome)
        self.seconds["scoring"] += time.perf_counter() - start

    async def _reset(self, rollout: Rollout) -> None:
        rollout.history = list(await self._guarded(rollout, self._begin(rollout)) or [])
        if not rollout.done:
            self._prompt(rollout, rollout.history, self._text)

    async def _begin(self, rollout: Rollout) -> Messages:
        rollout.episode = self.env.episode(rollout.problem)
        return await rollout.episode.reset()

    async def _step(self, rollout: Rollout, action: Action) -> None:
        assert rollout.episode is not None, "the episode runs on another rank"
        step = await self._guarded(rollout, rollout.episode.step(action))
        if step is None:
            return
        rollout.reward += step.reward
        for name, value in step.info.items():
            rollout.info[name] = rollout.info.get(name, 0.0) + value
        if step.token_advantages is not None:
            self._give_advantages(rollout, step, len(action.token_ids))
        if step.terminated or step.truncated or action.finish_reason == "length" or rollout.turns >= self.max_turns:
            rollout.done = True
        if not rollout.done:
            turn = {"role": "assistant", "content": TURN}
            asked = {"role": "user", "content": step.observation}
            self._prompt(rollout, [*rollout.history, turn, asked], self._text_after_turn)
            rollout.history += [{"role": "assistant", "content": action.text}, asked]

    def _give_advantages(self, rollout: Rollout, step: Step, count: int) -> None:
        given = step.token_advantages or []
        if len(given) != count:
            rollout.fail(Boundary.ENVIRONMENT, f"{len(given)} token_advantages for the {count} tokens of the turn")
            return
        before = rollout.token_advantages or []
        padding = [0.0] * (len(rollout.tokens) - count - len(before))
        rollout.token_advantages = before + padding + given

    async def _guarded(self, rollout: Rollout, turn: Awaitable[T]) -> T | None:
        """The environment's answer, or None and a failed rollout when it raises or takes too long."""
        try:
            return await asyncio.wait_for(turn, self.env.timeout_seconds)
        except TimeoutError:
            rollout.fail(Boundary.ENVIRONMENT, f"no answer within {self.env.timeout_seconds} s")
        except Exception as error:  # whatever an environment raises is its rollout's failure, not the run's
            rollout.fail(Boundary.ENVIRONMENT, error)
        return None

    # ---- prompts ----

    def _prompt(self, rollout: Rollout, messages: Messages, text_of: Any) -> None:
        """Appends the ids that come before the next turn; the model's own ids stay as they are."""
        try:
            token_ids = self.tokenizer.encode(text_of(rollout, messages), add_special_tokens=False)
        except Exception as error:  # a message that a template or tokenizer refuses is one rollout's failure
            rollout.fail(Boundary.PROMPT, error)
            return
        length = len(rollout.tokens) + len(token_ids)
        if not length or length > self.max_prompt_tokens:
            rollout.fail(Boundary.PROMPT, f"a prompt of {length} tokens; it takes 1 to {self.max_prompt_tokens}")
            return
        rollout.extend(token_ids, 0)

    def _text(self, rollout: Rollout, messages: Messages) -> str:
        return self.template.render(messages, add_generation_prompt=True, thinking=rollout.problem.thinking)

    def _text_after_turn(self, rollout: Rollout, messages: Messages) -> str:
        """What the template writes after the model's turn, less the end-of-turn token that the model itself wrote."""
        _, turn, after = self._text(rollout, messages).rpartition(TURN)
        if not turn:
            raise InputError("the chat template drops earlier turns, so the model's own ids cannot be extended")
        if rollout.tokens[-1] in self.eos:
            after = after.removeprefix(self.tokenizer.decode([rollout.tokens[-1]], skip_special_tokens=False))
        return after


async def _all(turns: Iterable[Coroutine[Any, Any, None]]) -> None:
    await asyncio.gather(*turns)
