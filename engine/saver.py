"""States written while training goes on: the values are copied, and a thread of each rank writes them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from engine.errors import EngineError
from engine.log import logger
from engine.parallel.collectives import Group
from engine.parallel.mesh import another_group, close_group
from engine.parallel.together import together
from engine.state import Snapshot, save_state, snapshot, write_state
from engine.trainer import Trainer


class StateSaver:
    """At most one state is on its way to the disk. What went wrong with it is raised, on every rank alike, by the next
    `save`, `wait` or `close`, and logged when it happens."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._mesh = trainer.model.mesh
        self._group: Group | None = None  # of the threads: the main threads' collectives must not mix with theirs
        self._thread: threading.Thread | None = None
        self._failure: EngineError | None = None

    def save(self, directory: str | Path, extra: dict[str, Any] | None = None, wait: bool = True) -> None:
        """See `state.save_state`. With `wait=False` it returns as soon as this rank's share of the state is copied,
        which takes as much memory again as that share; another save, a load, and `close` wait until it is written."""
        self.wait()
        self._mesh.agree("save_state", str(directory), wait)
        if wait:
            save_state(directory, self._trainer, extra)
            return
        with together(self._mesh.world):
            state = snapshot(self._trainer, extra)
            for piece in state.pieces:
                piece.keep()
        if self._group is None:
            self._group = another_group(self._mesh.world, self._trainer.config.parallel.timeout_seconds)
        # No daemon: a process that ends in the middle of a save writes it to its end.
        self._thread = threading.Thread(target=self._write, args=(directory, state, self._group), name="save_state")
        self._thread.start()

    def wait(self) -> None:
        """Returns when the last state is on the disk, on every rank; raises what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Waits, and ends the threads' connections."""
        try:
            self.wait()
        finally:
            if self._group is not None:
                close_group(self._group)
                self._group = None

    def _write(self, directory: str | Path, state: Snapshot, group: Group) -> None:
        try:
            write_state(directory, state, group)
        except Exception as error:
            logger.error("saving to %s failed: %s", directory, error)
            self._failure = error if isinstance(error, EngineError) else EngineError(f"saving failed: {error!r}")
