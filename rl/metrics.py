"""What a run writes about itself as it goes: one JSON object a line, cut back to the saved step on resume. Of several
ranks one writes."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from engine import is_main_rank

ECHO_SECONDS = 1.0  # torchrun sends its ranks the signal that the terminal has sent them already


class JsonLines:
    """A JSONL file to append to. Lines of steps at or after `resume_step` are dropped at the start: the run will
    write them again. Where there are several ranks, the main one's lines are the file; what others write is dropped."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self.path = path
        self._keeps = is_main_rank()
        if not self._keeps:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_lines(path) if line["step"] < resume_step] if resume_step else []
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(partial, path)

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record, which has a "step"."""
        if self._keeps:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file; none if it does not exist. A last line that a kill cut short is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


class Stopwatch:
    """Seconds spent under each name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Adds the time of the block to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Interruptible:
    """Within this block the first Ctrl-C (or SIGTERM) only sets `requested`, so that a step can be finished and
    saved; a second one, a moment later, raises KeyboardInterrupt at once. Handlers are restored at the end.

    `agree` (such as `Ranks.any`) makes of what this rank was told what all of them act on: signals do not reach them at
    the same moment. Every rank then reads `requested` at the same places.
    """

    def __init__(self, agree: Callable[[bool], bool] = bool) -> None:
        self._agree = agree
        self._told_at: float | None = None
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether to stop after this step."""
        return self._agree(self._told_at is not None)

    def __enter__(self) -> Interruptible:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._told_at is None:
            self._told_at = now
        elif now - self._told_at > ECHO_SECONDS:
            raise KeyboardInterrupt
