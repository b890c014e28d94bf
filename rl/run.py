"""A run in its directory: the engine, where training stands, what is written down, and how it goes on after a stop.

run_dir/state/          the engine's state and the step, replaced atomically
run_dir/metrics.jsonl   a line a step
run_dir/rollouts.jsonl  rollouts kept for the report
run_dir/checkpoint/     the result, a Hugging Face directory

Of several ranks, the main one alone writes the lines and the report; every rank calls what saves and loads.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from engine import ChatTemplate, Engine, Ranks, times_restarted
from rl.config import TrainConfig
from rl.env import make_environment
from rl.evaluate import evaluate
from rl.metrics import Interruptible, JsonLines, Stopwatch
from rl.progress import Progress
from rl.record import rollout_record
from rl.report import write_report
from rl.rollout import Collector, Rollout

GROUPS_KEPT = 2  # of a step whose rollouts are kept


class Run:
    """One GRPO run. Use it as a context manager: within, Ctrl-C asks it to stop after the step.

    Without `resume`, an earlier run in the directory is replaced; with it, or where torchrun has started the ranks
    again, its last complete state is loaded.
    Raises ConfigError, CheckpointError.
    """

    def __init__(self, config: TrainConfig, resume: bool = False, progress: Progress | None = None) -> None:
        self.config = config
        self.directory = Path(config.run_dir)
        self.env = make_environment(config.env.name, config.env.arguments)
        self.engine = Engine.from_pretrained(config.model, config.engine)
        template = ChatTemplate.from_pretrained(config.model)
        self.collector = Collector(self.engine, self.env, template, config.max_prompt_tokens, config.max_turns)
        self.watch = Stopwatch()
        self.progress = progress or Progress("train")
        self.interruption = Interruptible(self.engine.ranks.any)
        resume = goes_on(self.directory, resume, self.engine.ranks)
        self.step = open_directory(self.directory, self.engine, resume)
        self.metrics = JsonLines(self.directory / "metrics.jsonl", self.step)
        self.kept = JsonLines(self.directory / "rollouts.jsonl", self.step)
        self.addresses = self.engine.weight_addresses()
        self.saved_step = self.step

    def __enter__(self) -> Run:
        self.interruption.__enter__()
        self.progress.start(self.config.steps, self.step)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        self.interruption.__exit__(kind, error, trace)
        self.collector.close()

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C was pressed; every rank asks at the same places."""
        return self.interruption.requested

    def take_seconds(self) -> dict[str, float]:
        """Seconds spent since the last call, by what they were spent on."""
        seconds = self.collector.seconds | self.watch.seconds
        self.collector.seconds = {"rollout": 0.0, "scoring": 0.0}
        self.watch.seconds = {}
        return seconds

    def weight_bytes_moved(self) -> int:
        """Bytes of weights that do not lie where they lay when the run began: 0 as long as sampling and training
        share one copy in place."""
        after = self.engine.weight_addresses()
        return sum(size for name, (address, size) in self.addresses.items() if after.get(name) != (address, size))

    def evaluate(self) -> dict[str, float]:
        """Held-out accuracy and the seconds it took."""
        start = time.perf_counter()
        evaluation = evaluate(self.collector, self.config.evaluation, self.config.evaluation.thinking)
        self.take_seconds()  # the evaluation's own sampling is no part of the next step's
        return {"held_out_accuracy": evaluation.accuracy, "evaluation_seconds": time.perf_counter() - start}

    def report(self, record: dict[str, Any], groups: list[list[Rollout]]) -> None:
        """Writes the line of the step that has just been taken, and shows it."""
        self.metrics.write(record)
        every = self.config.keep_rollouts_every
        if every and (record["step"] % every == 0 or record["step"] == self.config.steps - 1):
            mixed = sorted(groups, key=lambda group: len({rollout.reward for rollout in group}) < 2)
            for group in mixed[:GROUPS_KEPT]:
                for rollout in group:
                    self.kept.write(rollout_record(record["step"], rollout, self.collector.tokenizer))
        self.progress.advance(self.step, record)

    def save(self) -> None:
        """Saves all that a resumed run needs; the disk is written while the next step runs."""
        with self.watch.time("saving"):
            self.engine.save_state(self.directory / "state", {"step": self.step}, wait=False)
        self.saved_step = self.step

    def finish(self) -> None:
        """Leaves the result of a complete run, or the state of an interrupted one."""
        if self.saved_step != self.step:
            self.save()
        self.engine.wait_for_saves()
        if not self.interrupted:
            self.engine.save_pretrained(self.directory / "checkpoint")

    def write_report(self) -> None:
        """Writes run_dir/report.html, which shows how the checkpoint came to be."""
        self.engine.ranks.once(lambda: write_report(self.directory / "report.html", self.directory))


def goes_on(directory: Path, resume: bool, ranks: Ranks) -> bool:
    """Whether the run in `directory` is to be resumed: where that was asked for, and where torchrun has started the
    ranks again and there is a state to go on from."""
    return resume or (times_restarted() > 0 and ranks.once(lambda: Engine.has_state(directory / "state")))


def open_directory(directory: Path, engine: Engine, resume: bool) -> int:
    """The step to go on from: 0 in a fresh directory, where an earlier run is removed, or that of the saved state.

    Raises CheckpointError when there is no complete state to resume.
    """
    if resume:
        return int(engine.load_state(directory / "state")["step"])
    engine.ranks.once(lambda: _clear(directory))
    return 0


def _clear(directory: Path) -> None:
    for name in ("state", "checkpoint"):
        shutil.rmtree(directory / name, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
