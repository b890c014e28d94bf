"""The report of a run: one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from rl.metrics import read_lines

Record = dict[str, Any]
TEMPLATE = Path(__file__).with_name("report.html")
MAX_STEPS_SHOWN = 16  # of those whose rollouts were kept: enough to see them change, few enough to load at once
TIMES = (
    ("rollout", "rollout", "blue"),
    ("training", "training", "amber"),
    ("scoring", "rewards", "green"),
    ("checking", "exactness check of filtered rollouts", "teal"),
    ("evaluation", "evaluation", "violet"),
    ("saving", "saving", "faint"),
)


def write_report(
    path: Path, train_dir: Path, sft_dir: Path | None = None, summary: Record | None = None, title: str = "Training run"
) -> None:
    """Writes the report of a GRPO run (and of the fine-tuning before it) to `path`, replacing what is there."""
    steps = read_lines(train_dir / "metrics.jsonl")
    data = {
        "lead": _lead(steps, summary),
        "tiles": _tiles(steps, summary),
        "sections": _sections(steps, read_lines(sft_dir / "metrics.jsonl") if sft_dir else []),
        "time": _time(steps),
        "rollouts": _spread(read_lines(train_dir / "rollouts.jsonl")),
    }
    embedded = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # no text can end the script element
    page = TEMPLATE.read_text(encoding="utf-8").replace("__TITLE__", html.escape(title))
    path.write_text(page.replace("__DATA__", embedded), encoding="utf-8")


def rate(steps: list[Record], tokens: str, time: str) -> float:
    """Tokens per second over all steps: the sum of `tokens` over the sum of the seconds spent on `time`."""
    seconds = sum(step["seconds"].get(time, 0.0) for step in steps)
    return sum(step[tokens] for step in steps) / seconds if seconds else 0.0


def _lead(steps: list[Record], summary: Record | None) -> str:
    launched = sum(step["launched"] for step in steps)
    checked = sum(step["checked_tokens"] for step in steps)
    text = (
        f"{len(steps)} steps, {launched:,} rollouts. The log-probability of each of {checked:,} sampled tokens was "
        "compared with the one the same weights give in training."
    )
    if summary:
        text += f" The whole took {summary['seconds']:.0f} seconds on {summary['threads']} threads."
    return text


def _tiles(steps: list[Record], summary: Record | None) -> list[Record]:
    tiles = []
    if summary:
        gained = (
            f"from {summary['accuracy_think_before']:.1%}, {summary['held_out_problems']} held-out problems, "
            f"temperature {summary['evaluation_temperature']:g}"
        )
        tiles.append(_tile("accuracy, thinking", f"{summary['accuracy_think_after']:.1%}", gained))
        gained = f"from {summary['accuracy_direct_before']:.1%}, the same problems"
        tiles.append(_tile("accuracy, direct", f"{summary['accuracy_direct_after']:.1%}", gained))
    difference = max((step["max_abs_logprob_difference"] for step in steps), default=0.0)
    tiles.append(_tile("max |Δ log p|", f"{difference:g}", "sampled against trained, every token"))
    moved = max((step["weight_bytes_moved"] for step in steps), default=0)
    tiles.append(_tile("weight bytes moved", f"{moved:,}", "to sample what was trained"))
    tiles.append(_tile("rollout", f"{rate(steps, 'rollout_tokens', 'rollout'):,.0f}", "tokens per second"))
    tiles.append(_tile("training", f"{rate(steps, 'train_tokens', 'training'):,.0f}", "tokens per second"))
    return tiles


def _tile(label: str, value: str, note: str) -> Record:
    return {"label": label, "value": value, "note": note}


def _sections(steps: list[Record], sft: list[Record]) -> list[Record]:
    for step in steps:  # rates per step, beside what was measured
        seconds = step["seconds"]
        step["rollout_rate"] = step["rollout_tokens"] / seconds["rollout"] if seconds.get("rollout") else None
        step["train_rate"] = step["train_tokens"] / seconds["training"] if step["train_tokens"] else None
    shares = all(0.0 <= step["reward"] <= 1.0 for step in steps if step["reward"] is not None)
    learning = [
        _chart("Reward", "percent" if shares else "", (steps, "reward", "rollouts", "blue"),
               (steps, "held_out_accuracy", "held out", "violet")),
        _chart("Completion length", "", (steps, "completion_tokens", "tokens", "teal")),
        _chart("Entropy", "", (steps, "entropy", "nats per token", "violet")),
        _chart("Tokens per second", "", (steps, "rollout_rate", "rollout", "blue"),
               (steps, "train_rate", "training", "amber")),
        _chart("Rollouts", "", (steps, "trained", "trained on", "green"), (steps, "filtered", "filtered", "faint"),
               (steps, "errored", "errored", "red")),
        _chart("Gradient norm", "", (steps, "gradient_norm", "before clipping", "amber")),
    ]  # fmt: skip
    before = [
        _chart("Loss", "", (sft, "loss", "per assistant token", "blue")),
        _chart("Held-out accuracy", "percent", (sft, "held_out_accuracy", "thinking", "violet")),
        _chart("Tokens per second", "", (sft, "tokens_per_second", "training", "amber")),
    ]
    sections = [{"title": "Reinforcement learning", "charts": learning}]
    return sections + ([{"title": "Supervised fine-tuning", "charts": before}] if sft else [])


def _chart(title: str, format: str, *series: tuple[list[Record], str, str, str]) -> Record:
    lines = [
        {"label": label, "colour": colour, "points": [[record["step"], record.get(key)] for record in records]}
        for records, key, label, colour in series
    ]
    return {"title": title, "format": format, "series": lines}


def _time(steps: list[Record]) -> list[Record]:
    parts = []
    for key, label, colour in TIMES:
        seconds = sum(step["seconds"].get(key, 0.0) for step in steps)
        if key == "evaluation":
            seconds = sum(step.get("evaluation_seconds", 0.0) for step in steps)
        if seconds:
            parts.append({"label": label, "colour": colour, "seconds": round(seconds, 3)})
    return parts


def _spread(rollouts: list[Record]) -> list[Record]:
    """The rollouts of at most MAX_STEPS_SHOWN steps, the first and the last among them."""
    steps = sorted({rollout["step"] for rollout in rollouts})
    if len(steps) > MAX_STEPS_SHOWN:
        last = MAX_STEPS_SHOWN - 1
        steps = [steps[round(i * (len(steps) - 1) / last)] for i in range(MAX_STEPS_SHOWN)]
    shown = set(steps)
    return [rollout for rollout in rollouts if rollout["step"] in shown]
