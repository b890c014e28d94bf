"""The safetensors format: header length (8 bytes, little endian), JSON header padded to 8 bytes, raw tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import CheckpointError

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its name, what its elements are, and how many along each axis."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


def header_bytes(entries: Iterable[Entry]) -> bytes:
    """What a file begins with; the raw tensors follow in the order of `entries`, without gaps."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + entry.num_bytes
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; no copy when it lies like that on the CPU already."""
    return tensor.cpu().contiguous().view(torch.uint8).numpy().data


def read_header(file: Path, remedy: str = "fetch it again") -> dict[str, dict[str, Any]]:
    """Name -> {dtype, shape, data_offsets}, after checking that the file is as long as it says it is.

    Raises CheckpointError.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            text = opened.read(length) if 8 + length <= size else b""
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror}); check that it is there, and its permissions"
        ) from None
    if size < 8 or 8 + length > size:
        raise CheckpointError(f"{file} is truncated: {size:,} bytes end inside its header; {remedy}")
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        _ = [(str(entry["dtype"]), tuple(entry["shape"])) for entry in header.values()]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is not a safetensors file: its header cannot be read ({error}); {remedy}"
        ) from None
    if size != 8 + length + end:
        word = "truncated" if size < 8 + length + end else "too long"
        raise CheckpointError(f"{file} is {word}: {size:,} bytes, expected {8 + length + end:,}; {remedy}")
    return header
