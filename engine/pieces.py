"""The pieces that a training state is made of: regions of whole tensors, in files of the ranks that keep them.

In a file, `kind/name@row,column` is the region of the tensor `name` of the whole checkpoint that begins there and has
the piece's shape. The kinds are the masters of the weights, the moments once there was a step, and the gradient where
one has been accumulated: `master`, `exp_avg`, `exp_avg_sq`, `grad`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from engine.errors import CheckpointError
from engine.kernels.dtypes import wide_dtype
from engine.parts import Part
from engine.region import Region, first_fault, whole
from engine.tensor_file import DTYPE_NAMES, Entry, header_bytes, raw_bytes, read_header
from engine.trainer import Trainer

Read = Callable[[], Tensor]
FILE_BYTES = 4 * 2**30
BLOCK_BYTES = 64 * 2**20  # of masters read at a time on their way to compute weights
OTHER = "use another saved state"


@dataclass
class Piece:
    """A region of a tensor, to be written: its entry in a file, and how to come by its rows, in one read or several."""

    entry: Entry
    reads: list[Read]

    def keep(self) -> None:
        """Copies the values to CPU memory, so that training can go on before they are written."""
        self.reads = [partial(Tensor.detach, read().to("cpu", copy=True)) for read in self.reads]


@dataclass(frozen=True)
class _Kept:
    """Rows [row, row + rows) of a weight whose optimizer state this rank keeps: what there is of it, by kind. Before
    the first step there is no master."""

    row: int
    rows: int
    kinds: dict[str, Tensor]

    def overlap(self, part: Part) -> tuple[int, Region] | None:
        """The rows of a part, of the same weight, that are among these: the first, counted from our first, and their
        region."""
        first, end = max(self.row, part.row), min(self.row + self.rows, part.row + part.shape[0])
        if first >= end:
            return None
        return first - self.row, Region(part.origin, part.shape).rows(first - part.row, end - first)


def pieces_of(trainer: Trainer) -> list[Piece]:
    """What this rank writes, so that all ranks together write every element once: the rows that it keeps optimizer
    state of, as far as it owns them."""
    kept_rows = _kept(trainer, trainer.num_accumulated > 0)
    found: list[Piece] = []
    for part in (part for part in trainer.model.parts() if part.owned):
        dtype = wide_dtype(part.weight.dtype)
        reads: dict[str, list[tuple[Region, Read]]] = {}
        for kept in kept_rows.get(id(part.weight), []):
            if common := kept.overlap(part):
                first, region = common
                here: dict[str, Read] = {"master": partial(part.weight.dense, kept.row + first, region.shape[0], dtype)}
                here |= {
                    kind: partial(kept_all.narrow, 0, first, region.shape[0]) for kind, kept_all in kept.kinds.items()
                }
                for kind, read in here.items():
                    reads.setdefault(kind, []).append((region, read))
        for kind, rows in reads.items():
            for region, joined in _joined(rows):
                at = ",".join(map(str, region.origin))
                found.append(Piece(Entry(f"{kind}/{part.name}@{at}", dtype, region.shape), joined))
    return found


def _joined(rows: list[tuple[Region, Read]]) -> list[tuple[Region, list[Read]]]:
    """Neighbouring rows as one region: fewer pieces, and so shorter headers."""
    runs: list[tuple[Region, list[Read]]] = []
    for region, read in rows:
        before, reads = runs[-1] if runs else (region, [])
        if reads and before.origin[0] + before.shape[0] == region.origin[0]:
            runs[-1] = (before.rows(0, before.shape[0] + region.shape[0]), [*reads, read])
        else:
            runs.append((region, [read]))
    return runs


def write_pieces(directory: Path, pieces: list[Piece], rank: int) -> list[str]:
    """The names of the files that were written, each with as many pieces as FILE_BYTES holds. Raises OSError."""
    files: list[list[Piece]] = []
    used = 0
    for piece in pieces:
        if not files or used + piece.entry.num_bytes > FILE_BYTES:
            files.append([])
            used = 0
        files[-1].append(piece)
        used += piece.entry.num_bytes
    names = [f"state-{rank:05d}-{number:05d}.safetensors" for number in range(len(files))]
    for name, members in zip(names, files, strict=True):
        with open(directory / name, "wb") as file:
            file.write(header_bytes(piece.entry for piece in members))
            for piece in members:
                for read in piece.reads:
                    file.write(raw_bytes(read()))
            file.flush()
            os.fsync(file.fileno())  # only the machine that wrote them knows that they are not on the disk yet
    return names


@dataclass(frozen=True)
class _Saved:
    """A piece in a file."""

    file: Path
    key: str
    region: Region


class PieceIndex:
    """The pieces of a saved state, and where they are."""

    def __init__(
        self, files: Iterable[Path], tensors: dict[str, tuple[int, ...]], kinds: list[str], dtype: torch.dtype
    ) -> None:
        """Reads the files' headers. Every piece must be of one of the `kinds` of one of the `tensors`, within its shape
        and of the dtype that goes with a model of `dtype`. Raises CheckpointError."""
        self._kinds = kinds
        self._pieces: dict[str, list[_Saved]] = {}
        expected = DTYPE_NAMES[wide_dtype(dtype)]
        for file in files:
            for key, entry in read_header(file, OTHER).items():
                tensor, _, place = key.rpartition("@")
                kind, _, name = tensor.partition("/")
                if kind not in kinds or name not in tensors or entry["dtype"] != expected:
                    raise CheckpointError(
                        f"{file} holds {key} of {entry['dtype']}, which is not of this state; {OTHER}"
                    )
                origin = tuple(int(number) if number.isdigit() else -1 for number in place.split(","))
                region, outer = Region(origin, tuple(entry["shape"])), whole(tensors[name])
                alike = len(origin) == len(region.shape) == len(outer.shape)
                if not alike or min(region.shape) < 1 or region.overlap(outer) != region:
                    raise CheckpointError(f"{file}: {key} of shape {region.shape} is not within {outer.shape}; {OTHER}")
                self._pieces.setdefault(tensor, []).append(_Saved(file, key, region))

    def check_complete(self, parts: list[Part], path: Path) -> None:
        """Every element of every part must be there once, in each kind. Raises CheckpointError."""
        for part in parts:
            for kind in self._kinds:
                pieces = [saved.region for saved in self._pieces.get(f"{kind}/{part.name}", [])]
                if fault := first_fault(Region(part.origin, part.shape), pieces):
                    place, count = fault
                    raise CheckpointError(
                        f"{path} is not complete: it holds {kind} of {part.name} at {list(place)} {count} times "
                        f"instead of once; {OTHER}"
                    )

    def restore(self, trainer: Trainer) -> None:
        """Reads what this rank holds, and no more: compute weights from the masters, and the rest where the optimizer,
        which has been allocated if there are moments, keeps it. Raises OSError, SafetensorError."""
        parts = trainer.model.parts()
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}

            def fill(target: Tensor, region: Region, tensor: str) -> None:
                for saved in self._pieces[tensor]:
                    if common := region.overlap(saved.region):
                        if saved.file not in opened:
                            opened[saved.file] = stack.enter_context(safe_open(saved.file, framework="pt"))
                        piece = opened[saved.file].get_slice(saved.key)[common.within(saved.region)]
                        target[common.within(region)].copy_(piece)

            for part in parts:
                dtype, row = wide_dtype(part.weight.dtype), part.row
                for block in Region(part.origin, part.shape).row_blocks(BLOCK_BYTES // dtype.itemsize):
                    values = torch.empty(block.shape, dtype=dtype)
                    fill(values, block, f"master/{part.name}")
                    part.weight.load_(values, row=row)
                    row += block.shape[0]
            kept_rows = _kept(trainer, "grad" in self._kinds)
            for part in parts:
                for kept in kept_rows.get(id(part.weight), []):
                    if common := kept.overlap(part):
                        first, region = common
                        for kind, tensor in kept.kinds.items():
                            fill(tensor.narrow(0, first, region.shape[0]), region, f"{kind}/{part.name}")


def _kept(trainer: Trainer, accumulated: bool) -> dict[int, list[_Kept]]:
    """All rows that this rank keeps optimizer state of, by the id of their weight, ascending; `accumulated`: and a
    gradient."""
    optimizer = trainer.optimizer
    found: dict[int, list[_Kept]] = {}
    for block, weight in optimizer.shares.own_rows():
        kinds: dict[str, Tensor] = {}
        if moments := optimizer.state.get(weight.name):
            kinds = {"master": moments.master, "exp_avg": moments.exp_avg, "exp_avg_sq": moments.exp_avg_sq}
        if accumulated:
            kinds["grad"] = weight.grad_buffer()
        found.setdefault(id(block.weight), []).append(_Kept(block.row, block.rows, kinds))
    return found
