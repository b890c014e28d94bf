"""The demo: a corpus, a model from random weights, supervised fine-tuning, reinforcement learning, a report.

DIR/corpus/          conversations, made by `python -m forge run`
DIR/sft/             the fine-tuning run
DIR/                 the GRPO run: state, metrics.jsonl, rollouts.jsonl, checkpoint
DIR/summary.json     what was measured
DIR/report.html      the same, to look at
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from engine import ChatTemplate, ConfigError, Engine, EngineError, Ranks, is_main_rank, load_config, times_restarted
from rl.config import SFTConfig, TrainConfig
from rl.env import make_environment
from rl.evaluate import evaluate
from rl.loop import train
from rl.metrics import read_lines
from rl.progress import Progress
from rl.report import rate, write_report
from rl.rollout import Collector
from rl.run import Run
from rl.sft import sft

DEMO_DIRECTORY = "runs/demo"
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
STAGES = ("corpus", "sft", "train")
PRODUCTS = ("corpus", "sft", "state", "checkpoint", "metrics.jsonl", "rollouts.jsonl", "before.json", "summary.json",
            "report.html")  # fmt: skip


def demo(
    directory: str, resume: bool = False, overrides: list[str] | None = None, console: Console | None = None
) -> bool:
    """Runs what is left of the demo in `directory`; returns whether it is complete, or was interrupted and saved.

    Without `resume` the products of an earlier demo there are removed first; where torchrun has started the ranks
    again, it goes on. Several ranks share each stage but the corpus, which one of them makes. An override is that of
    the stage it names: "corpus.records=500", "sft.steps=50", "train.steps=5". Raises ConfigError, EngineError.
    """
    start = time.perf_counter()
    console = console or Console(quiet=not is_main_rank())
    root = Path(directory)
    of_stage = _by_stage(overrides or [])
    sft_config = load_config(
        SFTConfig, EXAMPLES / "arithmetic_sft.toml",
        [f"run_dir={root}/sft", f"data={root}/corpus/accepted.jsonl", *of_stage["sft"]],
    )  # fmt: skip
    train_config = load_config(
        TrainConfig,
        EXAMPLES / "arithmetic.toml",
        [f"run_dir={root}", f"model={root}/sft/checkpoint", *of_stage["train"]],
    )
    ranks = Ranks.join(train_config.parallel)
    resume = resume or times_restarted() > 0
    corpus_made, unfinished, sft_made = ranks.once(lambda: _prepare(root, resume))
    if not corpus_made:
        ranks.once(lambda: _corpus(root, resume, of_stage["corpus"]))
    if not sft_made and not sft(sft_config, unfinished, Progress("supervised fine-tuning", console)):
        return False
    before = _before(root, train_config, ranks)
    under_way = ranks.once(lambda: resume and Engine.has_state(root / "state"))
    with Run(train_config, under_way, Progress("reinforcement learning", console)) as run:
        train(run)
        if run.step < train_config.steps:
            return False
        after = _both_modes(run.collector, train_config)
    seconds = time.perf_counter() - start
    ranks.once(lambda: _conclude(console, root, train_config, before, after, seconds))
    return True


def summarise(
    root: Path, config: TrainConfig, before: dict[str, Any], after: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """What was measured. Rates are over all steps of the GRPO run; `seconds` are those of this process."""
    steps = read_lines(root / "metrics.jsonl")
    return {
        "accuracy_think_before": before["think"]["accuracy"],
        "accuracy_think_after": after["think"]["accuracy"],
        "accuracy_direct_before": before["direct"]["accuracy"],
        "accuracy_direct_after": after["direct"]["accuracy"],
        "held_out_problems": after["think"]["problems"],
        "evaluation_temperature": config.evaluation.temperature,
        "tokens_think_before": before["think"]["mean_tokens"],
        "tokens_think_after": after["think"]["mean_tokens"],
        "max_abs_logprob_difference": max(step["max_abs_logprob_difference"] for step in steps),
        "checked_tokens": sum(step["checked_tokens"] for step in steps),
        "rollout_tokens_per_second": rate(steps, "rollout_tokens", "rollout"),
        "train_tokens_per_second": rate(steps, "train_tokens", "training"),
        "weight_bytes_moved": max(step["weight_bytes_moved"] for step in steps),
        "sft_steps": len(read_lines(root / "sft" / "metrics.jsonl")),
        "rl_steps": len(steps),
        "threads": config.engine.threads or len(os.sched_getaffinity(0)),
        "seconds": seconds,
    }


def _by_stage(overrides: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {stage: [] for stage in STAGES}
    for override in overrides:
        stage, dot, rest = override.partition(".")
        if stage not in found or not dot:
            raise ConfigError(
                f'override "{override}" names no stage; begin it with {", ".join(s + "." for s in STAGES)}'
            )
        found[stage].append(rest)
    return found


def _prepare(root: Path, resume: bool) -> tuple[bool, bool, bool]:
    """Makes room, unless something is to be gone on with; whether the corpus is there, the fine-tuning is under way,
    and it is complete."""
    if not resume:
        _remove(root)
    root.mkdir(parents=True, exist_ok=True)
    unfinished = resume and Engine.has_state(root / "sft" / "state")
    return unfinished, unfinished, resume and (root / "sft" / "checkpoint").exists()


def _conclude(
    console: Console, root: Path, config: TrainConfig, before: dict[str, Any], after: dict[str, Any], seconds: float
) -> None:
    summary = summarise(root, config, before, after, seconds)
    (root / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    write_report(root / "report.html", root, root / "sft", summary, "A model learns to think")
    _closing(console, summary, root)


def _remove(root: Path) -> None:
    for name in PRODUCTS:
        path = root / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _corpus(root: Path, resume: bool, overrides: list[str]) -> None:
    command = [sys.executable, "-m", "forge", "run", str(EXAMPLES / "arithmetic_graph.toml"), f"output={root}/corpus"]
    done = subprocess.run([*command, *overrides, *(["--resume"] if resume else [])])
    if done.returncode in (130, -2):
        raise KeyboardInterrupt
    if done.returncode:
        raise EngineError(f"the corpus was not made: `{' '.join(command[1:])}` ended with exit code {done.returncode}")


def _before(root: Path, config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    """Accuracy before reinforcement learning: measured once, and kept for a resumed demo."""
    path = root / "before.json"
    if not ranks.once(path.exists):
        engine = Engine.from_pretrained(config.model, config.engine)
        env = make_environment(config.env.name, config.env.arguments)
        collector = Collector(engine, env, ChatTemplate.from_pretrained(config.model))
        measured = _both_modes(collector, config)
        ranks.once(lambda: path.write_text(json.dumps(measured)))
        collector.close()
        engine.close()
    return ranks.once(lambda: json.loads(path.read_text()))


def _both_modes(collector: Collector, config: TrainConfig) -> dict[str, Any]:
    modes = (("think", True), ("direct", False))
    return {name: asdict(evaluate(collector, config.evaluation, thinking)) for name, thinking in modes}


def _closing(console: Console, summary: dict[str, Any], root: Path) -> None:
    title = f"{summary['held_out_problems']} held-out problems, temperature {summary['evaluation_temperature']:g}"
    table = Table("", "before", "after", title=title, title_justify="left")
    for mode, label in (("think", "accuracy, thinking"), ("direct", "accuracy, direct")):
        table.add_row(label, *(f"{summary[f'accuracy_{mode}_{when}']:.1%}" for when in ("before", "after")))
    table.add_section()
    table.add_row("rollout tokens/s", "", f"{summary['rollout_tokens_per_second']:,.0f}")
    table.add_row("training tokens/s", "", f"{summary['train_tokens_per_second']:,.0f}")
    tokens = f"{summary['checked_tokens']:,} tokens"
    table.add_row(f"max |Δ log p| over {tokens}", "", f"{summary['max_abs_logprob_difference']:g}")
    table.add_row("weight bytes copied or sent to sample", "", f"{summary['weight_bytes_moved']:,}")
    table.add_row("seconds", "", f"{summary['seconds']:.0f}")
    console.print(table)
    lines = (
        f"report:      {root}/report.html",
        f"talk to it:  python -m engine chat {root}/checkpoint --think   (it adds three-digit numbers: 347+585=)",
    )
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
