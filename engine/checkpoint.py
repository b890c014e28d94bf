"""Hugging Face directories in and out, tensor by tensor: never more than one tensor is held beside the model.

Each rank reads the regions of tensors that it holds; one rank writes what the others send to it, a block at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.architectures import model_config_from_hf, model_config_to_hf
from engine.atomic import Replacement, recover, write_error
from engine.config import ModelConfig
from engine.errors import CheckpointError, ConfigError
from engine.gather import Gatherer
from engine.parallel.mesh import Mesh
from engine.parallel.together import together
from engine.parts import EMBEDDING, HEAD, Part, tensor_shapes
from engine.region import Region, whole
from engine.tensor_file import DTYPE_NAMES, Entry, header_bytes, raw_bytes, read_header

if TYPE_CHECKING:
    from engine.model import Transformer
    from engine.tokenizer import Tokenizer

MAX_SHARD_BYTES = 5_000_000_000
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What a checkpoint directory may hold for saving to replace it.
OWNED = ("*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.txt", "*.model")

_READABLE = set(DTYPE_NAMES.values())
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)  # a buffer that old Llama checkpoints carry; we compute it
_COMPARE_ROWS = 4096


def read_config(directory: str | Path) -> ModelConfig:
    """The ModelConfig of a Hugging Face directory.

    The end-of-sequence ids are those of `config.json` and of `generation_config.json` together: chat models often
    name their end of turn only in the latter. Raises CheckpointError for a missing or broken file, ConfigError for a
    model that the engine does not offer.
    """
    path = _directory(directory)
    if not (path / "config.json").exists():
        raise CheckpointError(f"{path} has no config.json; give a directory in Hugging Face's layout")
    try:
        config = model_config_from_hf(_read_json(path / "config.json"))
    except ConfigError as error:
        raise ConfigError(f"{path / 'config.json'}: {error}") from None
    if not (path / "generation_config.json").exists():
        return config
    more = _read_json(path / "generation_config.json").get("eos_token_id")
    ids = list(config.eos_token_ids)
    ids += [token for token in (more if isinstance(more, list) else [more]) if token is not None and token not in ids]
    if len(ids) < 2:
        return msgspec.structs.replace(config, eos_token_id=ids[0] if ids else None)
    return msgspec.structs.replace(config, eos_token_id=ids)


def load_weights(directory: str | Path, model: Transformer) -> None:
    """Fills the model's weights from one or many `.safetensors`: each rank reads the regions that it holds.

    Files, names, shapes and dtypes of the whole checkpoint are all checked before the first weight is written; NaN and
    infinity are found as each tensor comes. After an error, which every rank raises alike, the model's weights are
    partly filled: drop it. Raises CheckpointError naming file, tensor, what was expected and the remedy.
    """
    mesh = model.mesh
    with together(mesh.world):
        path = _directory(directory)
        where = _check(path, tensor_shapes(model.config), model.config.tie_word_embeddings, mesh.is_main)
    by_file: dict[Path, list[Part]] = {}
    for part in model.parts():
        by_file.setdefault(where[part.name], []).append(part)
    with together(mesh.world):
        for file, parts in by_file.items():
            try:
                with safe_open(file, framework="pt") as tensors:
                    for part in parts:
                        _fill(part, tensors, file)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} cannot be read ({error}); fetch it again") from error


def save_pretrained(
    directory: str | Path,
    model: Transformer,
    tokenizer: Tokenizer | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a directory that transformers (4 and 5) and `load_weights` read; weights in the model's own dtype.

    Every rank calls it; the main rank writes, tensor by tensor, in blocks of rows that their owners send to it: the
    same bytes whatever the mesh is. Atomic: `directory` is the old checkpoint until the new one is complete on the
    disk. The tokenizer's files go with it. Raises CheckpointError (disk full, weights that are not finite, a directory
    with foreign files in it) on every rank and leaves what was there.
    """
    mesh = model.mesh
    gatherer = Gatherer(model.parts(), mesh)
    entries = [Entry(name, model.dtype, shape) for name, shape in tensor_shapes(model.config).items()]
    shards = _plan_shards(entries, max_shard_bytes)
    replacement = Replacement(directory, owns=OWNED)
    tmp = replacement.temporary
    try:
        with _written(replacement.target, mesh):
            if mesh.is_main:
                replacement.begin()
                _write_configs(tmp, model, tokenizer)
        weight_map: dict[str, str] = {}
        for index, shard in enumerate(shards):
            name = SINGLE if len(shards) == 1 else f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
            _write_shard(tmp / name, shard, gatherer, mesh, replacement.target)
            weight_map |= {entry.name: name for entry in shard}
        with _written(replacement.target, mesh):
            if mesh.is_main:
                if len(shards) > 1:
                    total = sum(entry.num_bytes for entry in entries)
                    _write_json(tmp / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
                replacement.commit()
    except BaseException:
        if mesh.is_main:
            replacement.abandon()
        raise


@contextmanager
def _written(target: Path, mesh: Mesh) -> Iterator[None]:
    """The block on every rank; a disk that refuses, and any other failure of one rank, is raised on all."""
    with together(mesh.world):
        try:
            yield
        except OSError as error:
            raise write_error(error, target) from error


def _write_configs(tmp: Path, model: Transformer, tokenizer: Tokenizer | None) -> None:
    config = model.config
    _write_json(tmp / "config.json", model_config_to_hf(config, model.dtype))
    tokens = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(tmp / "generation_config.json", {key: value for key, value in tokens.items() if value is not None})
    if tokenizer is not None:
        tokenizer.save(tmp)


def _fill(part: Part, tensors: Any, file: Path) -> None:
    """One region; on return it is held no more, so that the next one has its memory."""
    region = Region(part.origin, part.shape)
    value = tensors.get_slice(part.name)[region.within(whole(part.whole))]
    _refuse_not_finite(value, part.name, str(file), "the file is damaged or its training diverged", region)
    part.weight.load_(value, row=part.row)


def _directory(directory: str | Path) -> Path:
    path = Path(directory)
    recover(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; download the checkpoint and give the path to it")
    return path


def _check(path: Path, wanted: dict[str, tuple[int, ...]], tied: bool, compare: bool) -> dict[str, Path]:
    """The file of every tensor, after every file, name, shape and dtype was found to be right. `compare`: look also
    into the head that a tied model's file repeats, which one rank does for all."""
    headers = {file: read_header(file) for file in _weight_files(path)}
    where: dict[str, Path] = {}
    for file, header in headers.items():
        for name in header:
            if name in where:
                raise CheckpointError(f"tensor {name} is in both {where[name]} and {file}; remove the stray file")
            where[name] = file
    if missing := [name for name in wanted if name not in where]:
        hint = "it is incomplete, or its config.json is of another model"
        if missing == [HEAD]:
            hint = "if its head is the embedding, set tie_word_embeddings to true in config.json"
        raise CheckpointError(f"{path} lacks {_listing(missing)}; {hint}")
    spare = [name for name in where if name not in wanted and not name.endswith(_IGNORED_SUFFIXES)]
    if tied and HEAD in spare:
        if compare:
            _check_tied(where[EMBEDDING], where[HEAD])
        spare.remove(HEAD)
    if spare:
        raise CheckpointError(
            f"{path} holds {_listing(spare)}, which the model of its config.json does not have; "
            "leaving it out would change the model: correct config.json"
        )
    for name, shape in wanted.items():
        entry = headers[where[name]][name]
        if tuple(entry["shape"]) != shape:
            raise CheckpointError(
                f"{where[name]}: {name} has shape {tuple(entry['shape'])}, expected {shape} by config.json"
            )
        if entry["dtype"] not in _READABLE:
            raise CheckpointError(
                f"{where[name]}: {name} is {entry['dtype']}, expected one of {', '.join(sorted(_READABLE))}; "
                "save it dequantised first"
            )
    return where


def _weight_files(path: Path) -> list[Path]:
    if (path / INDEX).exists():
        weight_map = _read_json(path / INDEX).get("weight_map")
        names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
        if missing := [name for name in names if not (path / name).exists()]:
            raise CheckpointError(f"{path} lacks {_listing(missing)}, which {INDEX} names; fetch what is missing")
        if names:
            return [path / name for name in names]
        raise CheckpointError(f"{path / INDEX} names no files; fetch it again")
    if (path / SINGLE).exists():
        return [path / SINGLE]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickled = sorted(path.glob("*.bin"))
        hint = (
            f"{pickled[0].name} is a pickle: convert it to safetensors" if pickled else f"expected {SINGLE} or {INDEX}"
        )
        raise CheckpointError(f"{path} has no .safetensors file; {hint}")
    return files


def _check_tied(embedding: Path, head: Path) -> None:
    """A tied model's file may repeat the embedding as its head; it may not hold another matrix there."""
    with safe_open(embedding, framework="pt") as left, safe_open(head, framework="pt") as right:
        a, b = left.get_slice(EMBEDDING), right.get_slice(HEAD)
        same = a.get_shape() == b.get_shape()
        rows = range(0, a.get_shape()[0] if same else 0, _COMPARE_ROWS)
        if not (same and all(torch.equal(a[i : i + _COMPARE_ROWS], b[i : i + _COMPARE_ROWS]) for i in rows)):
            raise CheckpointError(
                f"{head}: lm_head.weight differs from model.embed_tokens.weight, but config.json says they are tied; "
                "set tie_word_embeddings to false there"
            )


def _refuse_not_finite(value: Tensor, name: str, where: str, remedy: str, region: Region) -> None:
    """`value` is `region` of the tensor."""
    if torch.isfinite(value.sum(dtype=torch.float32)):  # one pass; a mask of every value takes eight times as long
        return
    bad = (~torch.isfinite(value)).nonzero()
    if len(bad):  # or else the sum alone was too large
        first = bad[0].tolist()
        at = [begin + place for begin, place in zip(region.origin, first, strict=True)]
        raise CheckpointError(
            f"{where}: {name} holds NaN or infinity in {len(bad)} of {value.numel()} values, the first "
            f"({value[tuple(first)].item()}) at {at}; {remedy}"
        )


def _plan_shards(entries: list[Entry], max_shard_bytes: int) -> list[list[Entry]]:
    """Tensors in order, a new shard whenever the next would not fit; one beyond the limit has a shard to itself."""
    shards: list[list[Entry]] = []
    used = 0
    for entry in entries:
        if not shards or used + entry.num_bytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(entry)
        used += entry.num_bytes
    return shards


class _ShardFile:
    """A file of the checkpoint. The first thing that goes wrong ends the writing and is raised by `close`, because the
    other ranks, which do not know of it, go on sending."""

    def __init__(self, file: Path, entries: list[Entry]) -> None:
        self._failure: OSError | CheckpointError | None = None
        self._file: BinaryIO | None = None
        try:
            self._file = open(file, "wb")  # noqa: SIM115
            self._file.write(header_bytes(entries))
        except OSError as error:
            self._failure = error

    def write(self, value: Tensor, name: str, block: Region) -> None:
        if self._failure is not None or self._file is None:
            return
        try:
            remedy = "nothing was saved; go back to an earlier one"
            _refuse_not_finite(value, name, "the model in memory", remedy, block)
            self._file.write(raw_bytes(value))
        except (OSError, CheckpointError) as error:
            self._failure = error

    def close(self) -> None:
        try:
            if self._file is not None:
                self._file.close()
        except OSError as error:
            self._failure = self._failure or error
        if self._failure is not None:
            raise self._failure


def _write_shard(file: Path, entries: list[Entry], gatherer: Gatherer, mesh: Mesh, target: Path) -> None:
    """One file, written by the main rank from what all send; what stops it is raised on all once they have sent."""
    shard = _ShardFile(file, entries) if mesh.is_main else None
    for entry in entries:
        for block, value in gatherer.blocks(entry.name, entry.shape, entry.dtype):
            if shard is not None and value is not None:
                shard.write(value, entry.name, block)
    with _written(target, mesh):
        if shard is not None:
            shard.close()


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON ({error}); fetch it again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} holds a JSON {type(data).__name__}, expected an object; fetch it again")
    return data


def _write_json(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
