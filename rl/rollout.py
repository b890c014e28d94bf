"""Rollouts: problems become prompts, the engine samples turns, the environment answers and rewards them."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from engine import ChatTemplate, Completion, Engine, EngineError, InputError, SamplingParams
from rl.env import Action, Boundary, Environment, Episode, Failure, Messages, Problem, Step

T = TypeVar("T")
TURN = "\ue000"  # a private-use character that stands for the model's turn while a template is rendered


@dataclass
class Rollout:
    """One attempt at a problem. `tokens`, `loss_mask`, `logprobs` and `token_advantages` are per token and as long as
    the whole context; `loss_mask` is 1 on what the model wrote, and log-probabilities elsewhere are 0."""

    group: int
    problem: Problem
    episode: Episode
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
            [Rollout(group, problem, self.env.episode(problem)) for _ in range(group_size)]
            for group, problem in enumerate(problems, first_group)
        ]
        rollouts = [rollout for group in groups for rollout in group]
        self._environment(self._reset(rollout) for rollout in rollouts)
        for turn in range(self.max_turns):
            alive = [rollout for rollout in rollouts if not rollout.done]
            if not alive:
                break
            actions = self._sample(alive, params, derive_seed(seed, turn))
            self._environment(self._step(rollout, action) for rollout, action in actions)
        return groups

    # ---- the model's turn ----

    def _sample(self, alive: list[Rollout], params: SamplingParams, seed: int) -> list[tuple[Rollout, Action]]:
        """One turn of each. Rollouts of a group with the same context are sampled as one prompt with n."""
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
        taken = []
        for members, completions in zip(contexts.values(), results, strict=True):
            for rollout, completion in zip(members, completions, strict=True):
                if completion.finish_reason == "abort":
                    rollout.fail(Boundary.SAMPLING, "the completion was aborted")
                else:
                    taken.append((rollout, self._take(rollout, completion)))
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

    def _environment(self, turns: Any) -> None:
        start = time.perf_counter()
        self._loop.run_until_complete(_all(turns))
        self.seconds["scoring"] += time.perf_counter() - start

    async def _reset(self, rollout: Rollout) -> None:
        rollout.history = list(await self._guarded(rollout, rollout.episode.reset()) or [])
        if not rollout.done:
            self._prompt(rollout, rollout.history, self._text)

    async def _step(self, rollout: Rollout, action: Action) -> None:
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


async def _all(turns: Any) -> None:
    coroutines: list[Coroutine[Any, Any, None]] = list(turns)
    await asyncio.gather(*coroutines)
