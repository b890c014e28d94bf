"""csrc/cuda/attention.cu without a GPU: nvcc's PTX of it, run by the simulator in tests/ptx on CPU tensors.

`with simulated(): cuda_attention.forward(...)` does what a GPU would, from the host's arguments on; what the simulator
models, and that it knows nothing of the rounding inside one matrix instruction, is said there.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor

from engine.kernels.cuda import attention as cuda_attention
from tests.ptx.machine import Machine
from tests.ptx.parse import parse
from tests.ptx.syntax import Module

SOURCE = Path(__file__).resolve().parents[3] / "engine" / "csrc" / "cuda" / "attention.cu"
NVCC = shutil.which("nvcc")
BLOCKS = 3  # of a launch, so that they take several items each
_TYPES = {1: "13__nv_bfloat16", 2: "6__half"}
_FOLD, _DECODE = "4fold", "6decode"


@cache
def _entries() -> tuple[str, dict[str, str]]:
    """What comes before the first kernel, and each kernel's text by its name."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "attention.ptx"
        command = [str(NVCC), "-std=c++17", "-O3", "-fmad=false", "-arch=compute_90a", "-ptx", str(SOURCE)]
        subprocess.run([*command, "-o", str(file)], check=True, capture_output=True)
        head, *texts = re.split(r"^(?=(?:\.\w+ )?\.entry)", file.read_text(), flags=re.M)
    return head, {re.search(r"\.entry\s+(\w+)", text)[1]: text for text in texts}  # type: ignore[index]


@cache
def _kernel(stem: str, template: str) -> tuple[Module, str]:
    head, texts = _entries()
    (name,) = (name for name in texts if f"{stem}I{template}EEEv" in name)
    return parse(head + texts[name]), name


def _shared_bytes(head_dim: int, page_bytes: int) -> int:
    """As Shape::kBytes in attention.cu has it."""
    keys = 128 if head_dim <= 64 else 64
    stage, wide = keys * (head_dim * page_bytes + 16), keys * (head_dim + 8) * 2 if page_bytes == 1 else 0
    return 4 * stage + 2 * wide + 16 * (keys + 8) * 4


class _Extension:
    """In the place of engine._cuda."""

    BFLOAT16, FLOAT16, E4M3 = 1, 2, 3

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.tensors: list[Tensor] = []

    def attention_decode(self, *values: Any) -> None:
        *addresses, types, shape, factor, tree_sums, has_turns, _ = values
        head_dim = shape[3]
        structure = struct.pack("12Q2i9qf2?2x", *addresses, *types, *shape, factor, tree_sums, has_turns)
        own, page = _TYPES[types[0]], "h" if types[1] == self.E4M3 else "S2_"
        shared = _shared_bytes(head_dim, 1 if page == "h" else 2)
        runs = [(_DECODE, f"{own}{page}Li{head_dim}", shared)]
        if has_turns:
            runs.append((_FOLD, f"{own}Li{head_dim}", 0))
        for stem, template, size in runs:
            module, name = _kernel(stem, template)
            Machine(module, name, 128, size, **self.options).run((BLOCKS,), [structure], self.tensors)


@contextmanager
def simulated(**options: Any) -> Iterator[list[Any]]:
    """The decode runs on a Machine with these options inside this block, which gives the arguments of its last call."""
    extension, decode = _Extension(options), cuda_attention.decode
    given: list[Any] = []

    def noted(*arguments: Any) -> None:
        given[:] = arguments
        *tensors, _, plan, lists, _ = arguments
        owned = [lists.decode, lists.counts, lists.turns, lists.parts, plan.tables, plan.last_keys]
        extension.tensors = [*tensors, *owned]
        decode(*arguments)

    with (
        patch.object(cuda_attention, "cuda_extension", lambda: extension),
        patch.object(cuda_attention, "decode", noted),
    ):
        yield given
