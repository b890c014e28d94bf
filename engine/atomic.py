"""Directories that are either wholly there or not there at all, whatever kills the writer.

A directory `runs/model` is written as `runs/.model.tmp`, flushed to the disk, and renamed into place. One that stands
there already is first renamed to `runs/.model.old` and removed last. So at every moment a complete directory exists:
`model` itself, or, between the two renames, `.model.old` beside a complete `.model.tmp`. `recover` puts that moment
right and must be called before reading. One writer per directory at a time.
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


@contextmanager
def atomic_directory(path: str | Path, owns: Sequence[str] = ("*",)) -> Iterator[Path]:
    """`with atomic_directory(path) as tmp:` write files under `tmp`; they appear as `path` when the block ends.

    If the block raises, or the process dies at any moment, what stood at `path` before is still there, and nothing
    half-written is. A `path` that already holds an entry matching none of the patterns in `owns` is refused before
    anything is written: replacing it would delete somebody else's file. Files of the old directory are not carried
    over. Raises CheckpointError for that and for whatever the disk refuses (full, read-only, no permission).
    """
    target = Path(path).resolve()
    temporary, old = _temporary(target), _old(target)
    try:
        recover(target)
        _refuse_foreign(target, owns)
        if temporary.exists():
            shutil.rmtree(temporary)  # of a writer that was killed
        temporary.mkdir(parents=True)
        yield temporary
        _flush(temporary)
        if target.exists():
            os.rename(target, old)
        os.rename(temporary, target)
        _flush_directory(target.parent)
        shutil.rmtree(old, ignore_errors=True)  # what cannot be removed now is removed by the next `recover`
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        recover(target)
        raise CheckpointError(f"cannot write {target}: {_remedy(error, target)}") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        recover(target)
        raise


def recover(path: str | Path) -> None:
    """Finishes or undoes a replacement of `path` that was killed between its renames. Safe to call at any time."""
    target = Path(path).resolve()
    old = _old(target)
    if not old.exists():
        return
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(old, target)


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp")


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
