"""How a run shows itself: a live bar with its latest figures on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from engine import is_main_rank

PLAIN_SECONDS = 5.0  # between lines where there is no terminal to redraw

# What is shown of a record: its key, its label, how it is written.
FIGURES = (
    ("reward", "reward", "{:.3f}"),
    ("held_out_accuracy", "held out", "{:.1%}"),
    ("max_abs_logprob_difference", "max |Δ log p|", "{:g}"),
    ("loss", "loss", "{:.4f}"),
    ("completion_tokens", "length", "{:.1f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("tokens_per_second", "tok/s", "{:,.0f}"),
)
BAR_WIDTH = 20
OTHER_WIDTH = 26  # of steps, time and the gaps between columns


class Progress:
    """Progress of one stage. `start`, then `advance` once a step, then `stop`."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        self.title = title
        self.console = console or Console(quiet=not is_main_rank())
        self.steps = 0
        self._bars: Bars | None = None
        self._task = TaskID(0)
        self._shown: dict[str, Any] = {}
        self._last_line = 0.0

    def start(self, steps: int, step: int = 0) -> None:
        """Begins at `step` of `steps`."""
        self.steps = steps
        if self.console.is_terminal:
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(BAR_WIDTH),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("[dim]{task.fields[figures]}"),
            )
            self._bars = Bars(*columns, console=self.console)
            self._task = self._bars.add_task(self.title, total=steps, completed=step, figures="")
            self._bars.start()

    def advance(self, step: int, record: dict[str, Any]) -> None:
        """Shows that `step` steps are done, and the figures of the last; a figure that a record lacks stays."""
        self._shown |= {key: record[key] for key, _, _ in FIGURES if record.get(key) is not None}
        figures = [f"{label} {form.format(self._shown[key])}" for key, label, form in FIGURES if key in self._shown]
        if self._bars is not None:
            room = self.console.width - len(self.title) - BAR_WIDTH - OTHER_WIDTH
            self._bars.update(self._task, completed=step, figures=_fitting(figures, room))
            return
        now = time.monotonic()
        if step == self.steps or "held_out_accuracy" in record or now - self._last_line > PLAIN_SECONDS:
            self._last_line = now
            self.say(f"{self.title} {step}/{self.steps}  {'  '.join(figures)}")

    def say(self, text: str) -> None:
        """A line of its own."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Ends the bar; the last figures stay on the screen."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


def _fitting(figures: list[str], room: int) -> str:
    """As many of the figures, from the first on, as fit into `room` columns; one at least."""
    while len(figures) > 1 and len("  ".join(figures)) > room:
        figures = figures[:-1]
    return "  ".join(figures)
