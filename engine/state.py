"""All that training needs to go on bit for bit, in one directory that is always complete.

`state.json` holds the counters, the list of files and the caller's `extra`; `state-NNNNN.safetensors` hold, per weight,
its fp32 master and moments, and the gradient where one has been accumulated. Compute weights are not saved: they are
their masters, rounded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.atomic import atomic_directory, recover
from engine.errors import CheckpointError, InputError
from engine.kernels.dtypes import wide_dtype
from engine.kernels.weight import Weight
from engine.trainer import Trainer

FORMAT = 1
OWNED = ("state.json", "state-*.safetensors")
SHARD_BYTES = 256 * 2**20  # the serialiser copies a file's tensors: this bounds what a save takes beside the state


def save_state(directory: str | Path, trainer: Trainer, extra: dict[str, Any] | None = None) -> None:
    """Writes masters, moments, accumulated gradients, step, weight version and `extra` (anything JSON can hold).

    Atomic: killed at any moment, the last complete state is what `load_state` finds. Raises InputError when `extra` is
    not JSON, CheckpointError when the disk refuses, when `directory` holds something else, or when the last step was
    interrupted half-way; what was there stays.
    """
    optimizer = trainer.optimizer
    if optimizer.interrupted:
        raise CheckpointError("the last optimizer step was interrupted half-way; its weights are not worth saving")
    try:
        text = json.dumps(extra or {})
    except (TypeError, ValueError) as error:
        raise InputError(f"extra cannot be written as JSON: {error}; pass numbers, strings, lists and dicts") from None
    with atomic_directory(directory, owns=OWNED) as tmp:
        files: dict[str, list[str]] = {}
        for names, tensors in _shards(trainer):
            file = f"state-{len(files) + 1:05d}.safetensors"
            save_file(tensors, tmp / file)
            files[file] = names
        header = {
            "format": FORMAT,
            "dtype": str(trainer.model.dtype).removeprefix("torch."),
            "steps": optimizer.steps,
            "weight_version": trainer.weight_version,
            "num_accumulated": trainer.num_accumulated,
            "has_moments": bool(optimizer.state),
            "files": files,
        }
        (tmp / "state.json").write_text(json.dumps({**header, "extra": json.loads(text)}, indent=1))


def load_state(directory: str | Path, trainer: Trainer) -> dict[str, Any]:
    """Restores what `save_state` wrote into a trainer of the same model; returns `extra`.

    Every file, name and shape is checked before the first weight is touched. Raises CheckpointError.
    """
    path = Path(directory)
    recover(path)
    header = _read_header(path)
    dtype = str(trainer.model.dtype).removeprefix("torch.")
    if header["dtype"] != dtype:
        raise CheckpointError(
            f"{path} is the state of a {header['dtype']} model and this one is {dtype}; set EngineConfig.dtype to "
            f'"{header["dtype"]}"'
        )
    weights = {weight.name: weight for weight in trainer.optimizer.weights}
    kinds = ["master"]
    kinds += ["exp_avg", "exp_avg_sq"] if header["has_moments"] else []
    kinds += ["grad"] if header["num_accumulated"] else []
    files: dict[str, list[str]] = header["files"]
    try:
        _check(path, files, kinds, weights)
        _restore(path, header, kinds, weights, trainer)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); use another saved state") from error
    return header["extra"]


def _shards(trainer: Trainer) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
    """Weights in order, as many per file as SHARD_BYTES holds: their names, and tensors called kind/name."""
    names: list[str] = []
    tensors: dict[str, Tensor] = {}
    for weight in trainer.optimizer.weights:
        mine = _tensors(weight, trainer)
        size = sum(t.nbytes for t in mine.values())
        if names and size + sum(t.nbytes for t in tensors.values()) > SHARD_BYTES:
            yield names, tensors
            names, tensors = [], {}
        names.append(weight.name)
        tensors |= {f"{kind}/{weight.name}": tensor for kind, tensor in mine.items()}
    yield names, tensors


def _tensors(weight: Weight, trainer: Trainer) -> dict[str, Tensor]:
    moments = trainer.optimizer.state.get(weight.name)
    if moments is None:
        found = {"master": weight.dense(dtype=wide_dtype(weight.dtype))}
    else:
        found = {"master": moments.master, "exp_avg": moments.exp_avg, "exp_avg_sq": moments.exp_avg_sq}
    if trainer.num_accumulated:
        found["grad"] = weight.grad_buffer()
    return found


def _read_header(path: Path) -> dict[str, Any]:
    file = path / "state.json"
    if not file.exists():
        raise CheckpointError(f"{path} holds no saved state (no state.json); check the path")
    try:
        header = json.loads(file.read_text())
        if header["format"] != FORMAT:
            raise CheckpointError(f"{file} has format {header['format']}; this engine reads format {FORMAT}")
        for key in ("dtype", "steps", "weight_version", "num_accumulated", "has_moments", "files", "extra"):
            header[key]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged ({error!r}); use another saved state") from None
    return header


def _check(path: Path, files: dict[str, list[str]], kinds: list[str], weights: dict[str, Weight]) -> None:
    saved = [name for names in files.values() for name in names]
    if set(saved) != set(weights):
        odd = sorted(set(saved) ^ set(weights))
        whose = "the state" if odd[0] in weights else "the model"
        raise CheckpointError(
            f"{path} is the state of another model: {whose} lacks {odd[0]} ({len(odd)} names differ); use the model "
            "that it was saved from"
        )
    for file, names in files.items():
        with safe_open(path / file, framework="pt") as tensors:
            there = set(tensors.keys())
            for name in names:
                for kind in kinds:
                    key = f"{kind}/{name}"
                    shape = tuple(tensors.get_slice(key).get_shape()) if key in there else None
                    if shape != weights[name].shape:
                        raise CheckpointError(
                            f"{path / file}: {key} has shape {shape}, expected {weights[name].shape}; use the model "
                            "that it was saved from"
                        )


def _restore(
    path: Path, header: dict[str, Any], kinds: list[str], weights: dict[str, Weight], trainer: Trainer
) -> None:
    optimizer = trainer.optimizer
    optimizer.interrupted = True  # until all is read
    trainer.zero_grad()
    optimizer.state = {}
    if header["has_moments"]:
        optimizer.allocate()
    for file, names in header["files"].items():
        with safe_open(path / file, framework="pt") as tensors:
            for name in names:
                read = {kind: tensors.get_tensor(f"{kind}/{name}") for kind in kinds}
                weights[name].load_(read["master"])
                if header["has_moments"]:
                    moments = optimizer.state[name]
                    for kind in ("master", "exp_avg", "exp_avg_sq"):
                        getattr(moments, kind).copy_(read[kind])
                if "grad" in read:
                    weights[name].grad_buffer().copy_(read["grad"])
    optimizer.steps = header["steps"]
    trainer.weight_version = header["weight_version"]
    trainer.num_accumulated = header["num_accumulated"]
    optimizer.interrupted = False
