"""All that training needs to go on bit for bit, in one directory that is always complete, for any mesh.

`state-RRRRR-NNNNN.safetensors` are the files of rank R: pieces of tensors (`engine/pieces.py`), each element of which
one rank has written, so all files together hold each tensor once, however the ranks were arranged, and any other
arrangement can read the regions that it needs. `state.json` holds the counters, the shapes of the whole tensors, the
list of files and the caller's `extra`. Compute weights are not saved: they are their masters, rounded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from engine.atomic import Replacement, recover, write_error
from engine.errors import CheckpointError, InputError
from engine.log import logger
from engine.parallel.collectives import Group, all_gather_object
from engine.parallel.together import together
from engine.parts import tensor_shapes
from engine.pieces import OTHER, Piece, PieceIndex, pieces_of, write_pieces
from engine.trainer import Trainer

T = TypeVar("T")
FORMAT = 3
OWNED = ("state.json", "state-*.safetensors")
KEYS = {  # of state.json, and what they are
    "dtype": str,
    "steps": int,
    "weight_version": int,
    "num_accumulated": int,
    "has_moments": bool,
    "gradient_lanes": int,
    "context_lanes": int,
    "tensors": dict,
    "files": list,
    "extra": dict,
}


@dataclass(frozen=True)
class Snapshot:
    """What this rank writes of a state, and the header that the main rank writes."""

    header: dict[str, Any]
    pieces: list[Piece]


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
        "dtype": _dtype_name(trainer),
        "steps": optimizer.steps,
        "weight_version": trainer.weight_version,
        "num_accumulated": trainer.num_accumulated,
        "has_moments": optimizer.steps > 0,
        "gradient_lanes": trainer.gradient_lanes,
        "context_lanes": trainer.context_lanes,
        "mesh": model.mesh.shape,
        "tensors": {name: list(shape) for name, shape in tensor_shapes(model.config).items()},
        "extra": extra,
    }
    return Snapshot(header, pieces_of(trainer))


def write_state(directory: str | Path, state: Snapshot, group: Group) -> None:
    """Writes a snapshot that every rank of `group` has taken at the same moment; each rank writes its own files.

    Atomic: killed at any moment, the last complete state is what `load_state` finds. Raises CheckpointError on every
    rank when the disk refuses on one, or when `directory` holds something else; what was there stays.
    """
    replacement = Replacement(directory, owns=OWNED)
    temporary = replacement.temporary
    main = group.index == 0
    try:
        with together(group):
            if main:
                _on_disk(replacement, replacement.begin)
        with together(group):
            if not temporary.is_dir():
                raise CheckpointError(
                    f"rank {group.index} does not see {temporary}, which rank 0 has made; choose a directory on a file "
                    "system that all ranks share"
                )
            mine = _on_disk(replacement, lambda: write_pieces(temporary, state.pieces, group.index))
        files = [name for names in all_gather_object(mine, group) for name in names]
        with together(group):
            if main:
                text = json.dumps({**state.header, "files": files}, indent=1)
                _on_disk(replacement, lambda: (temporary / "state.json").write_text(text))
                _on_disk(replacement, replacement.commit)
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
    path, mesh, optimizer = Path(directory), trainer.model.mesh, trainer.optimizer
    with together(mesh.world):
        recover(path)
        header = _read_header(path)
        _check_model(path, header, trainer)
        files = [path / name for name in header["files"]]
        index = PieceIndex(files, tensor_shapes(trainer.model.config), _kinds(header), trainer.model.dtype)
        index.check_complete(trainer.model.parts(), path)
    optimizer.interrupted = True  # until all is read
    trainer.zero_grad()
    optimizer.state = {}
    _take_lanes(path, header, trainer)
    with together(mesh.world):
        if header["has_moments"]:
            optimizer.allocate()
        try:
            index.restore(trainer)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); {OTHER}") from error
    optimizer.steps = header["steps"]
    trainer.weight_version = header["weight_version"]
    trainer.num_accumulated = header["num_accumulated"]
    optimizer.interrupted = False
    return header["extra"]


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
        if wrong := [key for key, kind in KEYS.items() if not isinstance(header[key], kind)]:
            raise ValueError(f"{wrong[0]} is {header[wrong[0]]!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged ({error!r}); {OTHER}") from None
    return header


def _kinds(header: dict[str, Any]) -> list[str]:
    moments = ["exp_avg", "exp_avg_sq"] if header["has_moments"] else []
    return ["master", *moments, *(["grad"] if header["num_accumulated"] else [])]


def _check_model(path: Path, header: dict[str, Any], trainer: Trainer) -> None:
    if header["dtype"] != _dtype_name(trainer):
        raise CheckpointError(
            f"{path} is the state of a {header['dtype']} model and this one is {_dtype_name(trainer)}; set "
            f'EngineConfig.dtype to "{header["dtype"]}"'
        )
    saved = {name: tuple(shape) for name, shape in header["tensors"].items()}
    ours = tensor_shapes(trainer.model.config)
    if odd := sorted(name for name in saved.keys() | ours.keys() if saved.get(name) != ours.get(name)):
        there, here = (shapes.get(odd[0], "not there") for shapes in (saved, ours))
        raise CheckpointError(
            f"{path} is the state of another model: {odd[0]} is {there} in it and {here} in the model ({len(odd)} "
            "tensors differ); use the model that it was saved from"
        )


def _on_disk(replacement: Replacement, action: Callable[[], T]) -> T:
    try:
        return action()
    except OSError as error:
        raise write_error(error, replacement.target) from error


def _take_lanes(path: Path, header: dict[str, Any], trainer: Trainer) -> None:
    """Goes on with the lanes that the state was written with, unless the configuration names others, or they would
    leave replicas without one, or cannot be shared by the context-parallel ranks."""
    mesh, parallel = trainer.model.mesh, trainer.config.parallel
    gradient, context = header["gradient_lanes"], header["context_lanes"]
    wanted = {
        "gradient_lanes": parallel.gradient_lanes or max(gradient, mesh.dp.size),
        "context_lanes": parallel.context_lanes or (mesh.cp.size if context % mesh.cp.size else context),
    }
    for name, lanes in wanted.items():
        if lanes != getattr(trainer, name):
            setattr(trainer, name, lanes)
        if lanes != header[name] and mesh.is_main:
            logger.warning(
                "%s was written with %d %s and training goes on with %d: gradients are summed in another order; set "
                "parallel.%s to %d to keep their bits",
                path, header[name], name.replace("_", " "), lanes, name, header[name],
            )  # fmt: skip


def _dtype_name(trainer: Trainer) -> str:
    return str(trainer.model.dtype).removeprefix("torch.")
