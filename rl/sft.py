"""Supervised fine-tuning on conversations: the loss is on what the assistant says, and on nothing else."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import ChatTemplate, ConfigError, Engine, InputError, Ranks, Sample
from rl.config import SFTConfig
from rl.env import Environment, Messages, make_environment
from rl.evaluate import evaluate
from rl.fresh_model import write_fresh_model
from rl.metrics import Interruptible, JsonLines
from rl.progress import Progress
from rl.rollout import Collector, derive_seed
from rl.run import goes_on, open_directory


@dataclass(frozen=True)
class Conversation:
    """One line of the data."""

    messages: Messages
    thinking: bool


def sft(config: SFTConfig, resume: bool = False, progress: Progress | None = None) -> bool:
    """Runs the steps that are left and leaves a checkpoint in `run_dir`, or, when interrupted, a saved state; returns
    whether it is complete.

    Step k is a function of (configuration, data, k, weights). Raises ConfigError, InputError, CheckpointError.
    """
    directory, ranks = Path(config.run_dir), Ranks.join(config.parallel)
    resume = goes_on(directory, resume, ranks)
    env = make_environment(config.env.name, config.env.arguments) if config.env else None
    conversations = read_conversations(Path(config.data), env)
    model = config.model or str(directory / "start")
    if config.new_model is not None and not resume:
        texts = [message["content"] for conversation in conversations for message in conversation.messages]
        fresh = config.new_model
        ranks.once(lambda: write_fresh_model(Path(model), fresh, texts, config.seed))
    engine, template = Engine.from_pretrained(model, config.engine), ChatTemplate.from_pretrained(model)
    step = open_directory(directory, engine, resume)
    batches = shuffled_batches(to_samples(conversations, template, config.max_tokens), config, skip=step)
    metrics = JsonLines(directory / "metrics.jsonl", step)
    collector = Collector(engine, env, template) if env else None
    progress = progress or Progress("sft")
    progress.start(config.steps, step)
    good_enough = False
    saved = step
    try:
        with Interruptible(ranks.any) as interruption:
            while step < config.steps and not good_enough and not interruption.requested:
                record = sft_step(engine, next(batches), step, config)
                step += 1
                if collector and config.evaluation.every and step % config.evaluation.every == 0:
                    accuracy = evaluate(collector, config.evaluation, config.evaluation.thinking).accuracy
                    record["held_out_accuracy"] = accuracy
                    good_enough = config.stop_at_accuracy is not None and accuracy >= config.stop_at_accuracy
                metrics.write(record)
                progress.advance(step, record)
                if step % config.save_every == 0 or interruption.requested:
                    engine.save_state(directory / "state", {"step": step})
                    saved = step
            complete = good_enough or step >= config.steps
            if saved != step:
                engine.save_state(directory / "state", {"step": step})
            if complete:
                engine.save_pretrained(directory / "checkpoint")
    finally:
        progress.stop()
        if collector:
            collector.close()
    engine.close()
    return complete


def sft_step(engine: Engine, samples: list[Sample], step: int, config: SFTConfig) -> dict[str, Any]:
    """One gradient step; its line of metrics."""
    start = time.perf_counter()
    stats = engine.forward_backward(samples, "sft")
    update = engine.optim_step(learning_rate=config.schedule.at(step, config.steps))
    seconds = time.perf_counter() - start
    return {
        "step": step,
        "loss": stats.loss,
        "entropy": stats.metrics.get("entropy"),
        "gradient_norm": update.grad_norm,
        "learning_rate": update.learning_rate,
        "train_tokens": stats.num_tokens,
        "tokens_per_second": stats.num_tokens / seconds,
        "seconds": {"training": seconds},
    }


def read_conversations(path: Path, env: Environment | None) -> list[Conversation]:
    """The conversations of a JSONL file, without those whose question the environment holds out.

    Raises ConfigError for a file that is not there or not such, with the line.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(
            f"the data {path} cannot be read ({error.strerror}); `python -m forge run` makes some"
        ) from None
    conversations = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            messages = [{"role": message["role"], "content": message["content"]} for message in row["messages"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f'{path}, line {number}: not a JSON object with "messages" of "role" and "content" ({error!r})'
            ) from None
        questions = (message["content"] for message in messages if message["role"] == "user")
        if env is None or not any(map(env.is_held_out, questions)):
            conversations.append(Conversation(messages, bool(row.get("thinking", False))))
    if not conversations:
        raise ConfigError(f"{path} holds no conversation to train on")
    return conversations


def to_samples(conversations: list[Conversation], template: ChatTemplate, max_tokens: int) -> list[Sample]:
    """Token ids, and a loss mask that is 1 on what the assistant wrote and its end of turn. Longer ones than
    `max_tokens` are left out; InputError when that leaves none."""
    samples = []
    for conversation in conversations:
        tokens, mask = template.render_with_mask(conversation.messages, thinking=conversation.thinking)
        if len(tokens) <= max_tokens:
            samples.append(Sample(tokens=tokens, loss_mask=mask))
    if not samples:
        raise InputError(f"every conversation is longer than max_tokens = {max_tokens}; raise it")
    return samples


def shuffled_batches(samples: list[Sample], config: SFTConfig, skip: int = 0) -> Iterator[list[Sample]]:
    """Batches of at least `tokens_per_step` tokens, pass after pass, each in its own order; the first `skip` of them
    are passed over, so that a resumed run goes on with the batch that comes next."""
    batch: list[Sample] = []
    size = 0
    epoch = 0
    while True:
        order = list(range(len(samples)))
        random.Random(derive_seed(config.seed, "sft", epoch)).shuffle(order)
        for index in order:
            batch.append(samples[index])
            size += len(samples[index].tokens)
            if size >= config.tokens_per_step:
                if skip:
                    skip -= 1
                else:
                    yield batch
                batch, size = [], 0
        epoch += 1
