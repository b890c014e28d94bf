"""All that training needs to go on bit for bit, in one directory that is always complete, for any mesh.

`state-RRRRR-NNNNN.safetensors` are the files of rank R. They hold pieces: `kind/name@row,column` is the region that
begins there of the tensor `name` of the whole checkpoint (`engine/parts.py`), and has the piece's shape. The kinds are
the masters of the weights, the moments once there was a step, and the gradient where one has been accumulated:
`master`, `exp_avg`, `exp_avg_sq`, `grad`. Each element is written by one rank, so the pieces of all files together are
each tensor once, however the ranks that wrote them were arranged, and any other arrangement can read the regions that
it needs. `state.json` holds the counters, the shapes of the whole tensors, the list of files and the caller's `extra`.
Compute weights are not saved: they are their masters, rounded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.atomic import Replacement, recover, write_error
from engine.errors import CheckpointError, InputError
from engine.kernels.weight import Weight
from engine.log import logger
from engine.parallel.collectives import Group, all_gather_object
from engine.parallel.together import together
from engine.parts import Part, tensor_shapes
from engine.region import Region, first_fault, whole
from engine.tensor_file import DTYPE_NAMES, Entry, header_bytes, raw_bytes, read_header
from engine.trainer import Trainer

FORMAT = 2
OWNED = ("state.json", "state-*.safetensors")
SHARD_BYTES = 4 * 2**30
OTHER = "use another saved state"
BLOCK_BYTES = 64 * 2**20  # of masters read at a time on their way to compute weights
KEYS = (
    "dtype",
    "steps",
    "weight_version",
    "num_accumulated",
    "has_moments",
    "gradient_lanes",
    "tensors",
    "files",
    "extra",
)


@dataclass
class Piece:
    """A region of a tensor, to be written: its entry in a file, and how to come by its values."""

    entry: Entry
    read: Callable[[], Tensor]

    def keep(self) -> None:
        """Copies the values, so that training can go on before they are written."""
        copy = self.read().clone()
        self.read = lambda: copy


@dataclass(frozen=True)
class Snapshot:
    """What this rank writes of a state, and the header that the main rank writes."""

    header: dict[str, Any]
    pieces: list[Piece]


@dataclass(frozen=True)
class _Held:
    """Rows [row, row + rows) of a weight whose optimizer state this rank keeps: what there is of it, by kind. Before
    the first step there is no master."""

    weight: Weight
    row: int
    rows: int
    kinds: dict[str, Tensor]
    writes: bool  # the other ranks that keep these rows do not write them

    def overlap(self, part: Part) -> tuple[int, Region] | None:
        """The rows of a part that are among these: the first, counted from our first, and their region."""
        first, end = max(self.row, part.row), min(self.row + self.rows, part.row + part.shape[0])
        if part.weight is not self.weight or first >= end:
            return None
        return first - self.row, Region(part.origin, part.shape).rows(first - part.row, end - first)


@dataclass(frozen=True)
class _Saved:
    """A piece in a file."""

    file: Path
    key: str
    region: Region


def snapshot(trainer: Trainer, extra: dict[str, Any] | None = None) -> Snapshot:
    """What to write of a trainer's state as it is now; the pieces' values are read later, unless they are kept.

    Raises InputError when `extra` is not JSON, CheckpointError when the last step was interrupted half-way.
    """
    optimizer, model = trainer.optimizer, trainer.model
    if optimizer.interrupted:
        raise CheckpointError("the last optimizer step was interrupted half-way; its weights are not worth saving")
    try:
        extra = json.loads(json.dumps(extra or {}))
    except (TypeError, ValueError) as error:
        raise InputError(f"extra cannot be written as JSON: {error}; pass numbers, strings, lists and dicts") from None
    header = {
        "format": FORMAT,
        "dtype": _name(model.dtype),
        "steps": optimizer.steps,
        "weight_version": trainer.weight_version,
        "num_accumulated": trainer.num_accumulated,
        "has_moments": bool(optimizer.state),
        "gradient_lanes": _gradient_lanes(trainer),
        "mesh": model.mesh.shape,
        "tensors": {name: list(shape) for name, shape in tensor_shapes(model.config).items()},
        "extra": extra,
    }
    return Snapshot(header, list(_pieces(trainer)))


def write_state(directory: str | Path, state: Snapshot, group: Group) -> None:
    """Writes a snapshot that every rank of `group` has taken at the same moment; each rank writes its own files.

    Atomic: killed at any moment, the last complete state is what `load_state` finds. Raises CheckpointError on every
    rank when the disk refuses on one, or when `directory` holds something else; what was there stays.
    """
    replacement = Replacement(directory, owns=OWNED)
    main = group.index == 0
    try:
        with together(group):
            if main:
                _on_disk(replacement.target, replacement.begin)
        with together(group):
            if not replacement.temporary.is_dir():
                raise CheckpointError(
                    f"rank {group.index} does not see {replacement.temporary}, which rank 0 made; choose a directory "
                    "on a file system that all ranks share"
                )
            files = _on_disk(replacement.target, lambda: _write_files(replacement.temporary, state.pieces, group.index))
        everyone = all_gather_object(files, group)
        with together(group):
            if main:
                header = {**state.header, "files": [file for files in everyone for file in files]}
                text = json.dumps(header, indent=1)
                _on_disk(replacement.target, lambda: (replacement.temporary / "state.json").write_text(text))
                _on_disk(replacement.target, replacement.commit)
    except BaseException:
        if main:
            replacement.abandon()
        raise


def save_state(directory: str | Path, trainer: Trainer, extra: dict[str, Any] | None = None) -> None:
    """Writes masters, moments, accumulated gradients, step, weight version and `extra` (anything JSON can hold).

    Every rank calls it. See `snapshot` and `write_state` for what it raises.
    """
    world = trainer.model.mesh.world
    with together(world):
        state = snapshot(trainer, extra)
    write_state(directory, state, world)


def load_state(directory: str | Path, trainer: Trainer) -> dict[str, Any]:
    """Restores what `save_state` wrote, on this mesh or another, into a trainer of the same model; returns `extra`.

    Each rank reads the regions that it holds. Files, names, shapes, dtypes, and that every element is there once, are
    all checked before the first weight is touched. Raises CheckpointError on every rank alike.
    """
    path, mesh = Path(directory), trainer.model.mesh
    with together(mesh.world):
        if mesh.is_main:
            recover(path)
    with together(mesh.world):
        header = _read_header(path)
        _check_model(path, header, trainer)
        index = _index(path, header)
        _check_complete(path, index, _kinds(header), trainer)
    optimizer = trainer.optimizer
    optimizer.interrupted = True  # until all is read
    trainer.zero_grad()
    optimizer.state = {}
    with together(mesh.world):
        if header["has_moments"]:
            optimizer.allocate()
        try:
            _restore(index, header["num_accumulated"] > 0, trainer)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); {OTHER}") from error
    optimizer.steps = header["steps"]
    trainer.weight_version = header["weight_version"]
    trainer.num_accumulated = header["num_accumulated"]
    optimizer.interrupted = False
    if mesh.is_main and header["gradient_lanes"] != _gradient_lanes(trainer):
        logger.warning(
            "%s was written with %d gradient lanes and training goes on with %d: other sums, other last bits; set "
            "parallel.gradient_lanes to %d for the same",
            path, header["gradient_lanes"], _gradient_lanes(trainer), header["gradient_lanes"],
        )  # fmt: skip
    return header["extra"]


def _held(trainer: Trainer, accumulated: bool) -> Iterator[_Held]:
    optimizer, first = trainer.optimizer, trainer.model.mesh.data.index == 0
    for weight in optimizer.weights:
        kinds: dict[str, Tensor] = {}
        if moments := optimizer.state.get(weight.name):
            kinds = {kind: getattr(moments, kind) for kind in ("master", "exp_avg", "exp_avg_sq")}
        if accumulated:
            kinds["grad"] = weight.grad_buffer()
        yield _Held(weight, 0, weight.shape[0], kinds, first)


def _pieces(trainer: Trainer) -> Iterator[Piece]:
    parts = [part for part in trainer.model.parts() if part.owned]
    for held in _held(trainer, trainer.num_accumulated > 0):
        for part in parts:
            if not held.writes or not (common := held.overlap(part)):
                continue
            first, region = common
            rows, wide = region.shape[0], _wide(held.weight.dtype)
            reads: dict[str, Callable[[], Tensor]] = {}
            if "master" not in held.kinds:
                reads["master"] = partial(held.weight.dense, held.row + first, rows, wide)
            reads |= {kind: partial(tensor.narrow, 0, first, rows) for kind, tensor in held.kinds.items()}
            at = ",".join(map(str, region.origin))
            yield from (
                Piece(Entry(f"{kind}/{part.name}@{at}", wide, region.shape), read) for kind, read in reads.items()
            )


def _write_files(directory: Path, pieces: list[Piece], rank: int) -> list[str]:
    """The names of the files that were written, each with as many pieces as SHARD_BYTES holds."""
    files: list[list[Piece]] = []
    used = 0
    for piece in pieces:
        if not files or used + piece.entry.num_bytes > SHARD_BYTES:
            files.append([])
            used = 0
        files[-1].append(piece)
        used += piece.entry.num_bytes
    names = [f"state-{rank:05d}-{number:05d}.safetensors" for number in range(len(files))]
    for name, members in zip(names, files, strict=True):
        with open(directory / name, "wb") as file:
            file.write(header_bytes(piece.entry for piece in members))
            for piece in members:
                file.write(raw_bytes(piece.read()))
            file.flush()
            os.fsync(file.fileno())  # only the machine that wrote them knows that they are not on the disk yet
    return names


def _on_disk(target: Path, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except OSError as error:
        raise write_error(error, target) from error


def _read_header(path: Path) -> dict[str, Any]:
    file = path / "state.json"
    if not file.exists():
        raise CheckpointError(f"{path} holds no saved state (no state.json); check the path")
    try:
        header = json.loads(file.read_text())
        if header["format"] != FORMAT:
            raise CheckpointError(
                f"{file} has format {header['format']}; this engine reads format {FORMAT}: load it with the version "
                "that wrote it, and take its weights along with save_pretrained"
            )
        for key in KEYS:
            header[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged ({error!r}); {OTHER}") from None
    return header


def _kinds(header: dict[str, Any]) -> list[str]:
    moments = ["exp_avg", "exp_avg_sq"] if header["has_moments"] else []
    return ["master", *moments, *(["grad"] if header["num_accumulated"] else [])]


def _check_model(path: Path, header: dict[str, Any], trainer: Trainer) -> None:
    dtype = _name(trainer.model.dtype)
    if header["dtype"] != dtype:
        raise CheckpointError(
            f"{path} is the state of a {header['dtype']} model and this one is {dtype}; set EngineConfig.dtype to "
            f'"{header["dtype"]}"'
        )
    saved = {name: tuple(shape) for name, shape in header["tensors"].items()}
    ours = tensor_shapes(trainer.model.config)
    if odd := sorted(name for name in saved.keys() | ours.keys() if saved.get(name) != ours.get(name)):
        there, here = (shapes.get(odd[0], "not there") for shapes in (saved, ours))
        raise CheckpointError(
            f"{path} is the state of another model: {odd[0]} is {there} in it and {here} in the model ({len(odd)} tensors "
            "differ); use the model that it was saved from"
        )


def _index(path: Path, header: dict[str, Any]) -> dict[str, list[_Saved]]:
    """`kind/name` -> its pieces, after every entry of every file was found to be one that can be used."""
    index: dict[str, list[_Saved]] = {}
    wide = DTYPE_NAMES[_wide(getattr(torch, header["dtype"]))]
    kinds = _kinds(header)
    for file in (path / name for name in header["files"]):
        for key, entry in read_header(file, OTHER).items():
            name, _, place = key.rpartition("@")
            kind, _, tensor = name.partition("/")
            shape, origin = tuple(entry["shape"]), tuple(int(n) if n.isdigit() else -1 for n in place.split(","))
            outer = header["tensors"].get(tensor)
            if kind not in kinds or outer is None or entry["dtype"] != wide or len(origin) != len(outer):
                raise CheckpointError(f"{file} holds {key} of {entry['dtype']}, which no state of this kind does")
            region = Region(origin, shape)
            if len(shape) != len(outer) or region.overlap(whole(tuple(outer))) != region:
                raise CheckpointError(f"{file}: {key} has shape {shape}, which is not within {tensor} {tuple(outer)}")
            index.setdefault(name, []).append(_Saved(file, key, region))
    return index


def _check_complete(path: Path, index: dict[str, list[_Saved]], kinds: list[str], trainer: Trainer) -> None:
    for part in trainer.model.parts():
        for kind in kinds:
            pieces = [saved.region for saved in index.get(f"{kind}/{part.name}", [])]
            if fault := first_fault(Region(part.origin, part.shape), pieces):
                place, count = fault
                raise CheckpointError(
                    f"{path} is not complete: it holds {kind} of {part.name} at {list(place)} {count} times instead of "
                    f"once; {OTHER}"
                )


def _restore(index: dict[str, list[_Saved]], accumulated: bool, trainer: Trainer) -> None:
    parts = trainer.model.parts()
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}

        def fill(target: Tensor, region: Region, kind: str, name: str) -> None:
            for saved in index[f"{kind}/{name}"]:
                if common := region.overlap(saved.region):
                    if saved.file not in opened:
                        opened[saved.file] = stack.enter_context(safe_open(saved.file, framework="pt"))
                    piece = opened[saved.file].get_slice(saved.key)[common.within(saved.region)]
                    target[common.within(region)].copy_(piece)

        for part in parts:
            wide, row = _wide(part.weight.dtype), part.row
            for block in Region(part.origin, part.shape).row_blocks(BLOCK_BYTES // wide.itemsize):
                values = torch.empty(block.shape, dtype=wide)
                fill(values, block, "master", part.name)
                part.weight.load_(values, row=row)
                row += block.shape[0]
        for held in _held(trainer, accumulated):
            for part in parts:
                if common := held.overlap(part):
                    first, region = common
                    for kind, tensor in held.kinds.items():
                        fill(tensor.narrow(0, first, region.shape[0]), region, kind, part.name)


def _gradient_lanes(trainer: Trainer) -> int:
    return trainer.config.parallel.gradient_lanes or trainer.model.mesh.dp.size


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
