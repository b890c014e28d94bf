"""A folder that holds a run, row by row: it can be cut short at any byte and continued.

    run.json        what was run: graph, version, seed, fields
    accepted.jsonl  one finished record per line
    rejected.jsonl  one row per line that was not accepted: its record as far as it came, and why

Both files only grow, in the order of walks. Every row carries its provenance, so walk i of the run is in one file or
the other, and the first index that is in neither is where the run continues.
"""

from __future__ import annotations

import heapq
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import msgspec

from engine import EngineError
from forge.walk import Call, Failure

ACCEPTED, REJECTED, HEADER = "accepted.jsonl", "rejected.jsonl", "run.json"
BUFFER_BYTES = 1 << 20


class StoreError(EngineError):
    """A run's folder that cannot be written, or that does not belong to this run."""


class Provenance(msgspec.Struct, omit_defaults=True):
    """Where a row comes from. `key` is the hash of its `unique` fields, where the run has any."""

    graph: str
    version: str
    seed: int
    walk: int
    calls: list[Call]
    key: str = ""


class Header(msgspec.Struct, frozen=True):
    """What decides the bytes of a run's rows; a run continues only under an equal header."""

    graph: str
    version: str
    seed: int
    fields: tuple[str, ...]
    unique: tuple[str, ...]
    retries: int


class _Row(msgspec.Struct):
    provenance: Provenance
    failure: Failure | None = None


@dataclass
class Tally:
    """What has been written: the next walk, counts, the walk of each unique key, the last accepted walk (or -1)."""

    next_walk: int = 0
    accepted: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    keys: dict[str, int] = field(default_factory=dict)
    last_accepted: int = -1

    @property
    def rejected(self) -> int:
        return self.reasons.total()

    def add(self, provenance: Provenance, failure: Failure | None) -> None:
        """Counts the row of walk `next_walk`."""
        self.next_walk = provenance.walk + 1
        if failure is not None:
            self.reasons[failure.kind] += 1
            return
        self.accepted += 1
        self.last_accepted = provenance.walk
        if provenance.key:
            self.keys[provenance.key] = provenance.walk


class Store:
    """Writes a run's rows. Use `with`; rows are on their way to the disk after `flush`.

    `resume=False` starts afresh and keeps an earlier run's files beside it as `*.previous`. `resume=True` drops a
    half-written last line and whatever lies past the first missing walk, and continues there. Raises StoreError when
    the folder holds another run, is damaged or cannot be written.
    """

    def __init__(self, folder: str | Path, header: Header, *, resume: bool = False) -> None:
        self.folder, self.tally = Path(folder), Tally()
        self._encoder = msgspec.json.Encoder()
        self._files: list[BinaryIO] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if resume and (self.folder / HEADER).exists():
                self._check_header(header)
                self._recover()
            else:
                self._set_aside()
                self._write_header(header)
            for name in (ACCEPTED, REJECTED):
                self._files.append(open(self.folder / name, "ab", buffering=BUFFER_BYTES))  # noqa: SIM115
        except OSError as error:
            self.close()
            raise self._failed(error) from error

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def add(self, provenance: Provenance, fields: dict[str, Any], failure: Failure | None) -> None:
        """Appends a row: the fields beside the provenance when accepted, else the failure and the whole record."""
        accepted = failure is None
        row = (
            {**fields, "provenance": provenance}
            if accepted
            else {"failure": failure, "record": fields, "provenance": provenance}
        )
        try:
            self._files[0 if accepted else 1].write(self._encoder.encode(row) + b"\n")
        except OSError as error:
            raise self._failed(error) from error
        self.tally.add(provenance, failure)

    def flush(self) -> None:
        """Hands what was written to the operating system: a killed process loses nothing of it."""
        try:
            for file in self._files:
                file.flush()
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Writes out and closes the files, both even if one cannot be written."""
        files, self._files = self._files, []
        failed: OSError | None = None
        for file in files:
            try:
                file.close()
            except OSError as error:
                failed = error
        if failed is not None:
            raise self._failed(failed) from failed

    def _failed(self, error: OSError) -> StoreError:
        return StoreError(
            f"cannot write {self.folder}: {error.strerror or error}; make room or choose another output, then continue "
            "with --resume"
        )

    def _set_aside(self) -> None:
        for name in (HEADER, ACCEPTED, REJECTED):  # the header first: without it the rest is not taken for a run
            if (self.folder / name).exists():
                os.replace(self.folder / name, self.folder / f"{name}.previous")

    def _write_header(self, header: Header) -> None:
        partial = self.folder / f"{HEADER}.partial"
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(header)) + b"\n")
        os.replace(partial, self.folder / HEADER)

    def _check_header(self, header: Header) -> None:
        path = self.folder / HEADER
        try:
            before = msgspec.json.decode(path.read_bytes(), type=Header)
        except msgspec.DecodeError as error:
            raise StoreError(f"{path} is damaged ({error}); run without --resume to start afresh") from None
        for name in header.__struct_fields__:
            was, now = getattr(before, name), getattr(header, name)
            if was != now:
                raise StoreError(
                    f"{self.folder} holds a run with {name} {was!r}, not {now!r}; choose another output, or run "
                    "without --resume to start afresh"
                )

    def _recover(self) -> None:
        """Reads what is there in the order of walks, and cuts both files after the last walk before a gap."""
        keep = {self.folder / ACCEPTED: 0, self.folder / REJECTED: 0}
        for row, path, end in heapq.merge(*map(_whole_rows, keep), key=lambda each: each[0].provenance.walk):
            if row.provenance.walk == self.tally.next_walk:
                self.tally.add(row.provenance, row.failure)
                keep[path] = end
        for path, size in keep.items():
            if path.exists():
                os.truncate(path, size)


def _whole_rows(path: Path) -> Iterator[tuple[_Row, Path, int]]:
    """The rows of a file, each with the offset of its end; a last line that is cut short or not JSON is left out."""
    if not path.exists():
        return
    decoder, end = msgspec.json.Decoder(_Row), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = decoder.decode(line)
            except msgspec.DecodeError as error:
                if not next(file, b""):
                    return
                raise StoreError(
                    f"line {number} of {path} is damaged ({error}); restore it, or start afresh without --resume"
                ) from None
            end += len(line)
            yield row, path, end
