"""A batch's attention on a device: positions, pages and work lists, in memory that stays where it is.

# T tokens, S sequences
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from engine.kernels.attention_plan import AttentionPlan
from engine.kernels.triton.attention_work import Buffer, Segments, Tiles, WorkLists


class DevicePlan:
    """What the kernels of one device read of a plan: positions, pages, and a list of items for each shape of layer.

    `upload` brings it up to the plan's batch. Addresses stay put once `reserve` has been called, so captured graphs
    stay right when the plan is built again and uploaded. int32 memory: `counts` (T, T_kv), `query_positions` [T],
    `key_positions` [T_kv], `slots` [T_kv] (page * page_size + place in it), `last_keys` [T], `tables` (the page tables
    of all sequences, end to end).
    """

    def __init__(self, plan: AttentionPlan, device: torch.device) -> None:
        self.device = device
        self.fixed = False
        self._buffers = [Buffer(device) for _ in range(6)]
        self._lists: dict[tuple[int, int, int, Tiles], WorkLists] = {}
        self._derived: dict[Any, list[torch.Tensor]] = {}
        self._version = (-1, -1)
        self.upload(plan)

    @property
    def counts(self) -> torch.Tensor:
        return self._buffers[0].data

    @property
    def query_positions(self) -> torch.Tensor:
        return self._buffers[1].data

    @property
    def key_positions(self) -> torch.Tensor:
        return self._buffers[2].data

    @property
    def slots(self) -> torch.Tensor:
        return self._buffers[3].data

    @property
    def last_keys(self) -> torch.Tensor:
        return self._buffers[4].data

    @property
    def tables(self) -> torch.Tensor:
        return self._buffers[5].data

    def reserve(self, num_tokens: int, num_sequences: int, num_table_pages: int) -> None:
        """Room for every batch of up to so many rows in so many sequences, whose page tables name up to so many pages
        in all (a page counts once a sequence). Later batches that need more are refused. The batch that is here is
        forgotten until the next `upload`."""
        sizes = (2, *[num_tokens] * 4, num_table_pages)
        self.fixed = True
        for buffer, size in zip(self._buffers, sizes, strict=True):
            buffer.reserve(size)
            buffer.fixed = True
        self._limits = num_tokens, num_sequences
        self._version = (-1, -1)
        for lists in self._lists.values():
            lists.reserve(*self._limits)

    def upload(self, plan: AttentionPlan) -> None:
        """Takes in the batch that `plan` holds, if it is another than last time."""
        version = plan.version, plan.kv_plan.version
        if version == self._version:
            return
        self._version = version
        kv = plan.kv_plan
        starts, contexts = kv.cu_seqlens.numpy(), kv.context_lens.numpy()
        new = np.diff(starts)
        positions = kv.positions.numpy()
        owner = np.repeat(np.arange(len(new)), new)  # the sequence of each key row
        key = np.arange(len(owner)) - starts[1:][owner] + contexts[owner]  # which of its keys that row is
        self.num_tokens, self.num_keys, self.page_size = plan.num_tokens, len(owner), kv.page_size
        self.num_pages, self.num_positions = 0, int(positions.max(initial=-1)) + 1
        if kv.block_tables is None:
            slots, tables, table = np.arange(len(owner)), np.zeros(0), starts[:-1]
        else:
            pages = kv.block_tables.numpy()
            sizes = -(-contexts // kv.page_size)
            inside = np.arange(pages.shape[1])[None] < sizes[:, None]
            slots = pages[owner, key // kv.page_size].astype(np.int64) * kv.page_size + key % kv.page_size
            tables, table = pages[inside], np.cumsum(sizes) - sizes
            self.num_pages = int(tables.max(initial=-1)) + 1
        if kv is plan:
            rows, begins, sequence, sizes = np.arange(len(owner)), starts[:-1], np.arange(len(new)), new
        else:
            begins, ends = plan.begins.numpy(), plan.ends.numpy()
            sizes = ends - begins
            sequence = np.searchsorted(starts, begins, side="right") - 1
            rows = np.repeat(begins - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())
        shared = _shared_pages(kv)[sequence] * kv.page_size
        shared[:-1] *= np.diff(sequence) == 1
        first_key = (begins - starts[1:][sequence] + contexts[sequence]).astype(np.int64)
        self.segments = Segments(np.cumsum(sizes) - sizes, sizes, first_key, table[sequence], shared)
        counts = np.array([self.num_tokens, self.num_keys])
        arrays = (counts, positions[rows], positions, slots, key[rows], tables)
        for buffer, values in zip(self._buffers, arrays, strict=True):
            buffer.write(values)
        for lists in self._lists.values():
            lists.update(self.segments)
        self._derived.clear()

    def derived(self, key: Any, build: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
        """What `build` makes of the batch: made when it is first asked for by that `key`, kept until the next batch."""
        if key not in self._derived:
            self._derived[key] = build()
        return self._derived[key]

    def lists(self, group: int, num_kv_heads: int, window: int, tiles: Tiles) -> WorkLists:
        """The items for layers of `num_kv_heads` heads that `group` query heads share each; a window of 0 is none."""
        key = group, num_kv_heads, window, tiles
        if key not in self._lists:
            self._lists[key] = WorkLists(self.device, *key)
            if self.fixed:
                self._lists[key].reserve(*self._limits)
            self._lists[key].update(self.segments)
        return self._lists[key]


def _shared_pages(plan: AttentionPlan) -> np.ndarray:
    """How many first pages each sequence has in common with the next one, [S]."""
    shared = np.zeros(len(plan.context_lens), dtype=np.int64)
    if plan.block_tables is None or plan.block_tables.shape[1] == 0:
        return shared
    pages, sizes = plan.block_tables.numpy(), -(-plan.context_lens.numpy() // plan.page_size)
    some = np.flatnonzero(pages[1:, 0] == pages[:-1, 0])
    width = int(np.minimum(sizes[some], sizes[some + 1]).max(initial=0))
    same = np.logical_and.accumulate(pages[some, :width] == pages[some + 1, :width], axis=1).sum(1)
    shared[some] = np.minimum(same, np.minimum(sizes[some], sizes[some + 1]))
    return shared
