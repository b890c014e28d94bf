"""The output of every benchmark: a table of figures with their share of the machine's limit and their ratio to ours,
and a last line of JSON that holds the same."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import Machine


@dataclass
class Row:
    """One engine's figures for one workload; `values` has one figure per timed run."""

    workload: str
    engine: str
    values: list[float]
    unit: str
    share: float | None = None  # of the limit, 0 to 1
    limit: str = ""
    ratio: float | None = None  # how many times better ours is
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> float:
        return statistics.median(self.values)

    def cells(self) -> list[str]:
        spread = f" ({figure(min(self.values))}–{figure(max(self.values))})" if len(self.values) > 1 else ""
        return [
            self.workload,
            self.engine,
            f"{figure(self.value)} {self.unit}{spread}",
            "" if self.share is None else f"{100 * self.share:.0f}% {self.limit}",
            "" if self.ratio is None else f"{self.ratio:.2f}x",
        ]

    def as_json(self) -> dict[str, Any]:
        return {
            "workload": self.workload,
            "engine": self.engine,
            "value": self.value,
            "values": self.values,
            "unit": self.unit,
            "share_of_limit": self.share,
            "limit": self.limit,
            "ours_is_better_by": self.ratio,
            **self.more,
        }


HEADER = ["workload", "engine", "figure", "of the limit", "ours is better by"]


def figure(value: float) -> str:
    """Three or four digits, however large."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def compare(rows: Sequence[Row], lower_is_better: bool = False) -> None:
    """Fills `ratio` of every row but the first, which is ours."""
    ours = rows[0].value
    for row in rows[1:]:
        row.ratio = row.value / ours if lower_is_better else ours / row.value


def aligned(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table whose columns also line up in a terminal."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    everything = [header, ["-" * width for width in widths], *lines]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in everything
    )


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table."""
    return aligned(HEADER, [row.cells() for row in rows])


def show(benchmark: str, model: str, machine: Machine, rows: Sequence[Row], **more: Any) -> dict[str, Any]:
    """Prints the table, then one line of JSON; returns what the line holds."""
    print(f"{benchmark}, {model}. {machine.describe()}\n\n{markdown(rows)}\n")
    result = {
        "benchmark": benchmark,
        "model": model,
        "machine": machine.as_json(),
        "rows": [row.as_json() for row in rows],
        **more,
    }
    print(json.dumps(result), flush=True)
    return result


def peer_rows(
    path: Path | None, model: str, workload: str, unit: str, share: Callable[[float], tuple[float, str]]
) -> list[Row]:
    """Other engines' figures for this model and workload, from a file of JSON lines ("peer", "model", "workload",
    "value"), one row a peer and dtype. Only comparable when they were measured on this machine."""
    if path is None:
        return []
    found: dict[str, list[float]] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        if entry.get("model") != model or entry.get("workload") != workload or entry.get("value") is None:
            continue
        if entry["peer"] != "project":
            dtype = "" if entry.get("dtype") in ("bf16", "bfloat16") else f" ({entry.get('dtype')})"
            found.setdefault(f"{entry['peer']}{dtype}", []).append(float(entry["value"]))
    rows = [Row(workload, name, values, unit) for name, values in found.items()]
    for row in rows:
        row.share, row.limit = share(row.value)
    return rows
