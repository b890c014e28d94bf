"""Hugging Face directories in and out, tensor by tensor: never more than one tensor is held beside the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from engine.architectures import model_config_from_hf, model_config_to_hf
from engine.atomic import atomic_directory, recover
from engine.config import ModelConfig
from engine.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from engine.model import Transformer
    from engine.parts import Part
    from engine.tokenizer import Tokenizer

MAX_SHARD_BYTES = 5_000_000_000
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What a checkpoint directory may hold for saving to replace it.
OWNED = ("*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.txt", "*.model")

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_READABLE = {*_DTYPE_NAMES.values()}
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
    """Fills the model's weights from one or many `.safetensors`.

    Files, names, shapes and dtypes are all checked before the first weight is written; NaN and infinity are found as
    each tensor comes. After an error the model's weights are partly filled: drop it. Raises CheckpointError naming
    file, tensor, what was expected and the remedy.
    """
    path = _directory(directory)
    where = _check(path, model.parts(), model.config.tie_word_embeddings)
    by_file: dict[Path, list[Part]] = {}
    for part in model.parts():
        by_file.setdefault(where[part.name], []).append(part)
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

    Streams: one tensor at a time is unpacked and written. Atomic: `directory` is the old checkpoint until the new one
    is complete on the disk. The tokenizer's files go with it. Raises CheckpointError (disk full, weights that are not
    finite, a directory with foreign files in it) and leaves what was there.
    """
    config, parts = model.config, model.parts()
    shards = _plan_shards(parts, model.dtype, max_shard_bytes)
    with atomic_directory(directory, owns=OWNED) as tmp:
        _write_json(tmp / "config.json", model_config_to_hf(config, model.dtype))
        tokens = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(tmp / "generation_config.json", {key: value for key, value in tokens.items() if value is not None})
        if tokenizer is not None:
            tokenizer.save(tmp)
        weight_map: dict[str, str] = {}
        for index, shard in enumerate(shards):
            name = SINGLE if len(shards) == 1 else f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
            with open(tmp / name, "wb") as file:
                _write_safetensors(file, shard, model.dtype)
            weight_map |= {part.name: name for part in shard}
        if len(shards) > 1:
            total = sum(_num_bytes(part, model.dtype) for part in parts)
            _write_json(tmp / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _fill(part: Part, tensors: Any, file: Path) -> None:
    """One tensor; on return it is held no more, so that the next one has its memory."""
    value = tensors.get_tensor(part.name)
    _refuse_not_finite(value, part.name, str(file), "the file is damaged or its training diverged")
    part.weight.load_(value, row=part.row)


def _directory(directory: str | Path) -> Path:
    path = Path(directory)
    recover(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; download the checkpoint and give the path to it")
    return path


def _check(path: Path, parts: list[Part], tied: bool) -> dict[str, Path]:
    """The file of every tensor, after every file, name, shape and dtype was found to be right."""
    headers = {file: _read_header(file) for file in _weight_files(path)}
    where: dict[str, Path] = {}
    for file, header in headers.items():
        for name in header:
            if name in where:
                raise CheckpointError(f"tensor {name} is in both {where[name]} and {file}; remove the stray file")
            where[name] = file
    wanted = {part.name: part for part in parts}
    if missing := [name for name in wanted if name not in where]:
        hint = "it is incomplete, or its config.json is of another model"
        if missing == ["lm_head.weight"]:
            hint = "if its head is the embedding, set tie_word_embeddings to true in config.json"
        raise CheckpointError(f"{path} lacks {_listing(missing)}; {hint}")
    spare = [name for name in where if name not in wanted and not name.endswith(_IGNORED_SUFFIXES)]
    if tied and "lm_head.weight" in spare:
        _check_tied(where["model.embed_tokens.weight"], where["lm_head.weight"])
        spare.remove("lm_head.weight")
    if spare:
        raise CheckpointError(
            f"{path} holds {_listing(spare)}, which the model of its config.json does not have; "
            "leaving it out would change the model: correct config.json"
        )
    for name, part in wanted.items():
        entry = headers[where[name]][name]
        if tuple(entry["shape"]) != part.shape:
            raise CheckpointError(
                f"{where[name]}: {name} has shape {tuple(entry['shape'])}, expected {part.shape} by config.json"
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


def _read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Name -> {dtype, shape, data_offsets}, after checking that the file is as long as it says it is."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            text = opened.read(length) if 8 + length <= size else b""
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); check its permissions") from None
    if size < 8 or 8 + length > size:
        raise CheckpointError(f"{file} is truncated: {size:,} bytes end inside its header; fetch it again")
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        _ = [(str(entry["dtype"]), tuple(entry["shape"])) for entry in header.values()]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is not a safetensors file: its header cannot be read ({error})") from None
    if size != 8 + length + end:
        word = "truncated" if size < 8 + length + end else "too long"
        raise CheckpointError(f"{file} is {word}: {size:,} bytes, expected {8 + length + end:,}; fetch it again")
    return header


def _check_tied(embedding: Path, head: Path) -> None:
    """A tied model's file may repeat the embedding as its head; it may not hold another matrix there."""
    with safe_open(embedding, framework="pt") as left, safe_open(head, framework="pt") as right:
        a, b = left.get_slice("model.embed_tokens.weight"), right.get_slice("lm_head.weight")
        same = a.get_shape() == b.get_shape()
        rows = range(0, a.get_shape()[0] if same else 0, _COMPARE_ROWS)
        if not (same and all(torch.equal(a[i : i + _COMPARE_ROWS], b[i : i + _COMPARE_ROWS]) for i in rows)):
            raise CheckpointError(
                f"{head}: lm_head.weight differs from model.embed_tokens.weight, but config.json says they are tied; "
                "set tie_word_embeddings to false there"
            )


def _refuse_not_finite(value: torch.Tensor, name: str, where: str, remedy: str) -> None:
    if torch.isfinite(value.sum(dtype=torch.float32)):  # one pass; a mask of every value takes eight times as long
        return
    bad = (~torch.isfinite(value)).nonzero()
    if len(bad):  # or else the sum alone was too large
        first = bad[0].tolist()
        raise CheckpointError(
            f"{where}: {name} holds NaN or infinity in {len(bad)} of {value.numel()} values, the first "
            f"({value[tuple(first)].item()}) at {first}; {remedy}"
        )


def _plan_shards(parts: list[Part], dtype: torch.dtype, max_shard_bytes: int) -> list[list[Part]]:
    """Parts in order, a new shard whenever the next would not fit; a tensor beyond the limit has one to itself."""
    shards: list[list[Part]] = []
    used = 0
    for part in parts:
        size = _num_bytes(part, dtype)
        if not shards or used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(part)
        used += size
    return shards


def _write_safetensors(file: BinaryIO, parts: list[Part], dtype: torch.dtype) -> None:
    """The safetensors format: header length (8 bytes, little endian), JSON header padded to 8 bytes, raw tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for part in parts:
        end = offset + _num_bytes(part, dtype)
        header[part.name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(part.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for part in parts:
        value = part.weight.dense(row=part.row, rows=part.shape[0], dtype=dtype).contiguous()
        _refuse_not_finite(value, part.name, "the model in memory", "nothing was saved; go back to an earlier one")
        file.write(value.view(torch.uint8).numpy().data)


def _num_bytes(part: Part, dtype: torch.dtype) -> int:
    count = dtype.itemsize
    for size in part.shape:
        count *= size
    return count


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
