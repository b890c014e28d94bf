"""Directories that are either wholly there or not there at all, whatever kills the writer.

A directory `runs/model` is written as `runs/.model.tmp`, flushed to the disk, and renamed into place. One that stands
there already is first renamed to `runs/.model.old` and removed last. So at every moment a complete directory exists:
`model` itself, or, between the two renames, `.model.old` beside a complete `.model.tmp`. `recover` puts that moment
right and must be called before reading. One writer per directory at a time, or several ranks of one run that write
their files between the `begin` and the `commit` of one of them.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from engine.errors import CheckpointError


class Replacement:
    """The steps of replacing a directory: `begin`, files under `temporary`, `commit`; or `abandon`.

    `begin` and `commit` raise CheckpointError for a `path` that holds an entry matching none of the patterns in `owns`
    (replacing it would delete somebody else's file), and OSError for whatever the disk refuses.
    """

    def __init__(self, path: str | Path, owns: Sequence[str] = ("*",)) -> None:
        self.target = Path(path).resolve()
        self.temporary = self.target.with_name(f".{self.target.name}.tmp")
        self._old = _old(self.target)
        self._owns = owns

    def begin(self) -> None:
        """Makes an empty `temporary`."""
        recover(self.target)
        _refuse_foreign(self.target, self._owns)
        if self.temporary.exists():
            shutil.rmtree(self.temporary)  # of a writer that was killed
        self.temporary.mkdir(parents=True)

    def commit(self) -> None:
        """Puts `temporary` in the place of the target, once every file of it is on the disk."""
        _flush(self.temporary)
        if self.target.exists():
            os.rename(self.target, self._old)
        os.rename(self.temporary, self.target)
        _flush_directory(self.target.parent)
        shutil.rmtree(self._old, ignore_errors=True)  # what cannot be removed now is removed by the next `recover`

    def abandon(self) -> None:
        """Removes what was written; what stood at the target before stays."""
        shutil.rmtree(self.temporary, ignore_errors=True)
        recover(self.target)


@contextmanager
def atomic_directory(path: str | Path, owns: Sequence[str] = ("*",)) -> Iterator[Path]:
    """`with atomic_directory(path) as tmp:` write files under `tmp`; they appear as `path` when the block ends.

    If the block raises, or the process dies at any moment, what stood at `path` before is still there, and nothing
    half-written is. Files of the old directory are not carried over. Raises CheckpointError for foreign files in it
    (see `Replacement`) and for whatever the disk refuses (full, read-only, no permission).
    """
    replacement = Replacement(path, owns)
    try:
        replacement.begin()
        yield replacement.temporary
        replacement.commit()
    except BaseException as error:
        replacement.abandon()
        if isinstance(error, OSError):
            raise write_error(error, replacement.target) from error
        raise


def write_error(error: OSError, target: Path) -> CheckpointError:
    """The error to raise when the disk refused a file of the directory `target`: it says what to do."""
    return CheckpointError(f"cannot write {target}: {_remedy(error, target)}")


def recover(path: str | Path) -> None:
    """Finishes or undoes a replacement of `path` that was killed between its renames. Safe to call at any time."""
    target = Path(path).resolve()
    old = _old(target)
    if not old.exists():
        return
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        return
    try:
        os.rename(old, target)
    except FileNotFoundError:
        if not target.exists():  # unless another rank was faster
            raise


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _refuse_foreign(target: Path, owns: Sequence[str]) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file; give the name of a directory, new or written here before")
    for entry in sorted(os.listdir(target)):
        if not any(fnmatch(entry, pattern) for pattern in owns):
            raise CheckpointError(
                f'{target} holds "{entry}", which writing here would delete; choose an empty or new directory'
            )


def _remedy(error: OSError, target: Path) -> str:
    text = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        parent = next(p for p in target.parents if p.exists())
        free = shutil.disk_usage(parent).free
        return f"{text} ({free:,} bytes free on it); free some space or choose another disk. What was there is intact"
    return f"{text}; choose a directory that can be written. What was there is intact"


def _flush(directory: Path) -> None:
    for root, _, files in os.walk(directory):
        for name in files:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
        _flush_directory(Path(root))


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
