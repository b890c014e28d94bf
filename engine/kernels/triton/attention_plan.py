"""A batch's attention as work lists on a device, in memory that stays where it is from batch to batch.

An item is some (token, query head) rows that share a key/value head and a page table, token-major, and a range of keys.
What bits a row has depends neither on how rows are dealt into items nor on which items are split: that is all that is
decided here, and it is decided for balance alone.

# T tokens, K key/value heads, G query heads per key/value head
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.errors import InputError
from engine.kernels.attention_plan import AttentionPlan

ITEM = 8  # numbers of an item, see _Tiling
TURN = 3  # numbers of a token to fold: its row, where its list of partial results begins, and how long that is
MAX_PARTIALS = 2048  # (token, split) pairs whose results go through memory, at most: 34 MB at 32 heads of 128 columns


@dataclass(frozen=True)
class Tiles:
    """How attention is cut up. `block_n` and `split` are part of what the bits are; the rest is speed.

    `block_m` rows against `block_n` keys at a time. `split` keys, a multiple of block_n, are summed on their own before
    they are folded into what came before. Sequences of no more than `decode_m` rows (new tokens times query heads per
    key/value head) go in tiles of that many. `warps`, `decode_warps`, `stages` are Triton's for both; `programs` and
    `decode_programs` those of a launch, which share out its items.
    """

    block_m: int
    decode_m: int
    block_n: int
    split: int = 512
    warps: int = 4
    decode_warps: int = 4
    stages: int = 2
    programs: int = 132
    decode_programs: int = 264


class _Buffer:
    """int32 memory on a device that keeps its address: it grows only until it is `fixed`."""

    def __init__(self, device: torch.device) -> None:
        self.data = torch.zeros(16, dtype=torch.int32, device=device)
        self.fixed = False

    def reserve(self, size: int) -> None:
        if size <= self.data.numel():
            return
        if self.fixed:
            raise InputError(
                f"the batch needs a work list of {size} numbers and room was reserved for {self.data.numel()}; "
                "reserve the plan for the largest batch before graphs are captured"
            )
        self.data = torch.zeros(size, dtype=torch.int32, device=self.data.device)

    def write(self, values: np.ndarray) -> None:
        flat = torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32).reshape(-1))
        if flat.numel() > self.data.numel():
            self.reserve(flat.numel() * (2 - self.fixed))
        if self.data.is_cuda:
            flat = flat.pin_memory()  # so that the host does not wait for the copy
        self.data[: flat.numel()].copy_(flat, non_blocking=True)


@dataclass(frozen=True)
class _Segments:
    """Runs of queries, each of one sequence: [Q] each."""

    first_row: np.ndarray
    num_tokens: np.ndarray
    first_last_key: np.ndarray  # the last key that the first of them sees
    table: np.ndarray  # where the sequence's pages begin in `DevicePlan.tables`; without pages, the row of its key 0


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
        self._buffers = [_Buffer(device) for _ in range(6)]
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
        first_key = (begins - starts[1:][sequence] + contexts[sequence]).astype(np.int64)
        self.segments = _Segments(np.cumsum(sizes) - sizes, sizes, first_key, table[sequence])
        counts = np.array([self.num_tokens, self.num_keys])
        arrays = (counts, positions[rows], positions, slots, key[rows], tables)
        for buffer, values in zip(self._buffers, arrays, strict=True):
            buffer.write(values)
        for lists in self._lists.values():
            lists.update()
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
            self._lists[key] = WorkLists(self, *key)
            if self.fixed:
                self._lists[key].reserve(*self._limits)
            self._lists[key].update()
        return self._lists[key]


@dataclass(frozen=True)
class _Tiling:
    """Tiles of rows, [N] each; an item is one of them against some of its keys."""

    first_row: np.ndarray  # (token, query head) rows: token * G + head
    num_rows: np.ndarray
    table: np.ndarray
    key_begin: np.ndarray  # a multiple of block_n
    key_end: np.ndarray
    seen_begin: np.ndarray  # keys in [seen_begin, seen_end) are seen by all its rows
    seen_end: np.ndarray
    num_splits: np.ndarray

    def items(self, which: np.ndarray, key_begin: np.ndarray, key_end: np.ndarray, part: np.ndarray) -> np.ndarray:
        """[N, ITEM]; `part` is the place of an item's partial results, or -1 for one that has all keys of its rows."""
        shared = (self.first_row, self.num_rows, self.table)
        seen = (self.seen_begin, self.seen_end)
        return np.stack([*(x[which] for x in shared), key_begin, key_end, *(x[which] for x in seen), part], 1)


class WorkLists:
    """The items of a batch for layers of one shape, in int32 memory: `counts` (items of block_m rows, items of decode_m
    rows, tokens to fold), `walk`, `decode` [.., ITEM], `turns` [.., TURN] and `parts` (the lists of the turns)."""

    def __init__(self, plan: DevicePlan, group: int, num_kv_heads: int, window: int, tiles: Tiles) -> None:
        self._plan, self._group, self._num_kv_heads, self._window, self._tiles = (
            plan,
            group,
            num_kv_heads,
            window,
            tiles,
        )
        self._buffers = [_Buffer(plan.device) for _ in range(5)]
        self.num_walk = self.num_decode = self.num_turns = self.num_partials = 0  # of the batch, on the host

    @property
    def counts(self) -> torch.Tensor:
        return self._buffers[0].data

    @property
    def walk(self) -> torch.Tensor:
        return self._buffers[1].data

    @property
    def decode(self) -> torch.Tensor:
        return self._buffers[2].data

    @property
    def turns(self) -> torch.Tensor:
        return self._buffers[3].data

    @property
    def parts(self) -> torch.Tensor:
        return self._buffers[4].data

    def reserve(self, num_tokens: int, num_sequences: int) -> None:
        """Room for every batch of up to so many rows in so many sequences."""
        tiles = self._tiles
        per_tile = max(1, tiles.block_m // self._group * self._group)
        walk = num_sequences + num_tokens * self._group // per_tile + MAX_PARTIALS
        sizes = (3, ITEM * walk, ITEM * (num_sequences + MAX_PARTIALS), TURN * MAX_PARTIALS, MAX_PARTIALS)
        for buffer, size in zip(self._buffers, sizes, strict=True):
            buffer.reserve(size)
            buffer.fixed = True

    def update(self) -> None:
        """Takes in the batch that the plan holds."""
        tiles, segments = self._tiles, self._plan.segments
        few = segments.num_tokens * self._group <= tiles.decode_m
        tilings = self._tiling(~few, tiles.block_m), self._tiling(few, tiles.decode_m)
        work = sum(int(t.num_splits.sum()) for t in tilings) * self._num_kv_heads
        longest = max(1, -(-work // tiles.decode_programs))  # splits that one program may walk through and be in time
        self.num_partials = 0
        lists, turns, parts = [], [np.zeros((0, TURN))], [np.zeros(0)]
        for tiling in tilings:
            lists.append(self._deal(tiling, longest, turns, parts))
        every_turn = np.concatenate(turns)
        self.num_walk, self.num_decode, self.num_turns = len(lists[0]), len(lists[1]), len(every_turn)
        counts = np.array([self.num_walk, self.num_decode, self.num_turns])
        for buffer, values in zip(self._buffers, (counts, *lists, every_turn, np.concatenate(parts)), strict=True):
            buffer.write(values)

    def _tiling(self, chosen: np.ndarray, block: int) -> _Tiling:
        segments, group, tiles = self._plan.segments, self._group, self._tiles
        if group <= block:
            block = block // group * group  # whole tokens
        rows = segments.num_tokens[chosen].astype(np.int64) * group
        count = -(-rows // block)
        owner = np.repeat(np.arange(len(rows)), count)
        begin = (np.arange(len(owner)) - (np.cumsum(count) - count)[owner]) * block
        num_rows = np.minimum(block, rows[owner] - begin)
        first_key = segments.first_last_key[chosen][owner]
        first_last, last_last = first_key + begin // group, first_key + (begin + num_rows - 1) // group
        lowest = np.maximum(0, first_last - self._window + 1) if self._window else np.zeros_like(first_last)
        key_begin = lowest // tiles.block_n * tiles.block_n
        return _Tiling(
            segments.first_row[chosen][owner] * group + begin, num_rows, segments.table[chosen][owner], key_begin,
            last_last + 1, np.maximum(0, last_last - self._window + 1) if self._window else lowest, first_last + 1,
            last_last // tiles.split - key_begin // tiles.split + 1,
        )  # fmt: skip

    def _deal(self, tiling: _Tiling, longest: int, turns: list[np.ndarray], parts: list[np.ndarray]) -> np.ndarray:
        """Items, those with the most keys first; tiles of more than `longest` splits become an item each split."""
        split, group = self._tiles.split, self._group
        tokens = tiling.num_rows // group
        need = tokens * tiling.num_splits
        cut = (tiling.num_splits > longest) & (tiling.num_rows % group == 0)
        cut &= np.cumsum(need * cut) + self.num_partials <= MAX_PARTIALS
        whole = np.flatnonzero(~cut)
        items = [tiling.items(whole, tiling.key_begin[whole], tiling.key_end[whole], np.full(len(whole), -1))]
        if cut.any():
            which = np.flatnonzero(cut)
            tile = np.repeat(which, tiling.num_splits[which])
            number = _counting(tiling.num_splits[which])  # of the split, within its tile
            base = np.zeros(len(cut), dtype=np.int64)
            base[which] = self.num_partials + np.cumsum(need[which]) - need[which]
            begin = (tiling.key_begin[tile] // split + number) * split
            end = np.minimum(begin + split, tiling.key_end[tile])
            items.append(
                tiling.items(tile, np.maximum(begin, tiling.key_begin[tile]), end, base[tile] + number * tokens[tile])
            )
            tile, token = np.repeat(which, tokens[which]), _counting(tokens[which])
            length = tiling.num_splits[tile]
            at = sum(map(len, parts)) + np.cumsum(length) - length
            turns.append(np.stack([tiling.first_row[tile] // group + token, at, length], 1))
            parts.append(np.repeat(base[tile] + token, length) + _counting(length) * np.repeat(tokens[tile], length))
            self.num_partials += int(need[which].sum())
        every = np.concatenate(items)
        return every[np.argsort(every[:, 3] - every[:, 4], kind="stable")]


def _counting(lengths: np.ndarray) -> np.ndarray:
    """0 .. lengths[0] - 1, 0 .. lengths[1] - 1, and so on."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
