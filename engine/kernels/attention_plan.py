"""What attention knows of a batch.

# T tokens, S sequences, B pages per sequence
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from engine.errors import InputError
from engine.kernels.attention_pages import BLOCK, TEMPORARY_PAGE
from engine.kernels.memory import CPU
from engine.kernels.op import cpu_missing, extension

if TYPE_CHECKING:
    from engine.kernels.triton.attention_plan import DevicePlan


class AttentionPlan:
    """What attention knows of a batch: whose rows are whose, where keys live, and how the work is divided.

    Built once per batch and read by every layer. A recorded graph keeps the plan and replays attention for whatever it
    holds at that time. `AttentionPlan(kv_plan)` is a plan of queries alone: some rows of `kv_plan`, which says of all
    rows where their keys live (see build_segments); without it `kv_plan` is the plan itself. With a `device` other than
    the CPU the C++ kernels' work lists are left out, which take longer than the rest, and the checks that go with them.
    """

    def __init__(self, kv_plan: AttentionPlan | None = None, device: torch.device = CPU) -> None:
        self._kv_plan = kv_plan
        self.native = None if cpu_missing() or device.type != "cpu" else extension().AttentionPlan()
        self.version = 0  # counts builds
        self.num_tokens = 0
        self.num_pages = 0  # one more than the largest page named
        self.page_size = BLOCK
        self._on_device: dict[torch.device, DevicePlan] = {}

    @classmethod
    def of_sequences(cls, lengths: Sequence[int], device: torch.device = CPU) -> AttentionPlan:
        """The plan of whole sequences, packed end to end, positions from 0, without a cache."""
        sizes = np.array(lengths, dtype=np.int32)
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
        plan = cls(device=device)
        plan.build(starts, sizes, np.arange(starts[-1], dtype=np.int32) - np.repeat(starts[:-1], sizes))
        return plan

    @property
    def kv_plan(self) -> AttentionPlan:
        """The plan of the rows that keys and values come from."""
        return self if self._kv_plan is None else self._kv_plan

    def build(
        self,
        cu_seqlens: Tensor | np.ndarray,
        context_lens: Tensor | np.ndarray,
        positions: Tensor | np.ndarray,
        block_tables: Tensor | np.ndarray | None = None,
        page_size: int = TEMPORARY_PAGE,
    ) -> None:
        """Takes a batch in; everything is copied.

        Sequence s owns rows cu_seqlens[s] to cu_seqlens[s + 1] (int32 [S + 1]) and has keys 0 .. context_lens[s] - 1
        (int32 [S]), its own rows' being the last of them; a row sees the keys up to its own. `positions` (int32 [T])
        are what RoPE turns by. block_tables[s, i] (int32 [S, B]) is the page of keys i * page_size and up; None is for
        attention without a cache. Neighbouring sequences of few rows whose tables begin with the same pages have those
        read once. Raises InputError when these do not fit together.
        """
        arrays = [_int32(cu_seqlens, "cu_seqlens", 1), _int32(context_lens, "context_lens", 1),
                  _int32(positions, "positions", 1)]  # fmt: skip
        tables = None if block_tables is None else _int32(block_tables, "block_tables", 2)
        self.cu_seqlens, self.context_lens, self.positions = arrays
        self.block_tables = tables
        num_seqs, num_tokens = self.context_lens.shape[0], self.positions.shape[0]
        if self.cu_seqlens.shape[0] != num_seqs + 1 or int(self.cu_seqlens[-1]) != num_tokens:
            raise InputError(
                f"a plan of {num_seqs} context_lens and {num_tokens} positions needs cu_seqlens of {num_seqs + 1} that "
                f"end at {num_tokens}; it has {self.cu_seqlens.shape[0]} that end at {int(self.cu_seqlens[-1])}"
            )
        if tables is not None and tables.shape[0] != num_seqs:
            raise InputError(f"block_tables has {tables.shape[0]} rows; {num_seqs} sequences need one each")
        self.version += 1
        self.page_size, self.num_tokens = page_size, num_tokens
        if self.native is None:
            self.num_pages = 0
            return
        address, width = (0, 0) if tables is None else (tables.data_ptr(), tables.shape[1])
        try:
            self.native.build(*(a.data_ptr() for a in arrays), num_seqs, address, width, page_size)
        except ValueError as error:
            raise InputError(str(error)) from None
        self.num_pages = self.native.num_pages

    def build_segments(self, begins: Tensor | np.ndarray, ends: Tensor | np.ndarray) -> None:
        """Makes queries of the rows [begins[i], ends[i]) of `kv_plan` (int32 [Q]), which must be built.

        Segments are in the order of the rows and lie within a sequence each. A query sees the keys that it sees in
        `kv_plan`, and is turned by the position it has there. `kv_plan` must stay as it is while this plan is used.
        Raises InputError for other segments, and for a plan that was not made from a `kv_plan`.
        """
        kv = self._kv_plan
        if kv is None:
            raise InputError("this plan has no other plan's rows to choose from; make it as AttentionPlan(kv_plan)")
        begins, ends = _int32(begins, "begins", 1), _int32(ends, "ends", 1)
        if begins.shape != ends.shape:
            raise InputError(f"there are {begins.shape[0]} begins and {ends.shape[0]} ends; a segment has one of each")
        self.begins, self.ends = begins, ends
        self.version += 1
        self.page_size, self.num_pages, self.num_tokens = kv.page_size, kv.num_pages, int((ends - begins).sum())
        if self.native is not None:
            try:
                self.native.build_segments(kv.native, begins.data_ptr(), ends.data_ptr(), begins.shape[0])
            except ValueError as error:
                raise InputError(str(error)) from None

    def on_device(self, device: torch.device) -> DevicePlan:
        """The plan as the kernels of that device read it, up to date. Made once for each device."""
        from engine.kernels.triton.attention_plan import DevicePlan

        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())  # one device, one name
        if device not in self._on_device:
            self._on_device[device] = DevicePlan(self, device)
        self._on_device[device].upload(self)
        return self._on_device[device]

    def rows(self) -> Tensor:
        """Which row of `kv_plan` each query is, int64 [T]."""
        if self._kv_plan is None:
            return torch.arange(self.num_tokens, device=CPU)
        begins, ends = self.begins.tolist(), self.ends.tolist()
        runs = [np.arange(begin, end) for begin, end in zip(begins, ends, strict=True)]
        return torch.from_numpy(np.concatenate([np.arange(0), *runs]))


def _int32(values: Tensor | np.ndarray, name: str, dims: int) -> Tensor:
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if tensor.dtype != torch.int32 or tensor.dim() != dims:
        raise InputError(f"{name} is {tensor.dtype} of {tensor.dim()} dimensions; the plan takes torch.int32 of {dims}")
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
