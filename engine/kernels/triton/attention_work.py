"""The work lists of attention: which rows a program takes against which keys.

An item is some (token, query head) rows that share a key/value head and a page table, token-major, and a range of keys.
What bits a row has depends neither on how rows are dealt into items nor on which items are split: that is all that is
decided here, and it is decided for balance alone.

    a tile of rows                        an item with all keys of its rows, whose splits are folded in registers
    a tile that would take longest        an item for each split; its tokens' turns fold them
    a few rows of a sequence (decode)     the same, whatever it would take: so the kernel of few rows need not fold
    a few rows of several sequences       items for the splits that all of them share (a prompt, sampled several times),
    with the same first pages             read once for all; an item for each other split of each; turns fold them

# T tokens, K key/value heads, G query heads per key/value head
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.errors import InputError

ITEM = 8  # numbers of an item, see _Tiling
TURN = 3  # numbers of a token to fold: its row, where its list of partial results begins, and how long that is


@dataclass(frozen=True)
class Tiles:
    """How attention is cut up. `block_n` and `split` are part of what the bits are; the rest is speed.

    `block_m` rows against `block_n` keys at a time. `split` keys, a multiple of block_n, are summed on their own before
    they are folded into what came before. Sequences of no more than `decode_m` rows (new tokens times query heads per
    key/value head) go in tiles of that many. No more than `partials` (token, split) pairs have results that go through
    memory: 136 MB at 32 heads of 128 columns. `warps` and `stages` are Triton's for tiles of block_m rows,
    `decode_warps` and `decode_stages` for the others; `programs` and `decode_programs` those of a launch, which share
    out its items. The last two save registers and change no bit: `fold_after` folds a split after its last tile and not
    before the next one's first (wgmma would have to wait there), `reload` reads an item's rows anew after its walk.
    """

    block_m: int
    decode_m: int
    block_n: int
    split: int = 512
    warps: int = 4
    decode_warps: int = 4
    stages: int = 2
    decode_stages: int = 2
    programs: int = 132
    decode_programs: int = 264
    partials: int = 8192
    fold_after: bool = False
    reload: bool = False


class Buffer:
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
class Segments:
    """Runs of queries, each of one sequence: [Q] each."""

    first_row: np.ndarray
    num_tokens: np.ndarray
    first_last_key: np.ndarray  # the last key that the first of them sees
    table: np.ndarray  # where the sequence's pages begin in `DevicePlan.tables`; without pages, the row of its key 0
    shared_keys: np.ndarray  # keys that lie in pages which the next segment's sequence has too, from key 0 on


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


@dataclass(frozen=True)
class _Groups:
    """Which tiles go together against the splits that they share: [N] each, of a list of tiles."""

    leader: np.ndarray  # the first tile of its group
    num_splits: np.ndarray  # that the group shares; 0 is for a tile that is in none
    num_tokens: np.ndarray  # of the whole group
    tokens_before: np.ndarray  # in the group

    @classmethod
    def none(cls, count: int) -> _Groups:
        return cls(np.arange(count), *(np.zeros(count, dtype=np.int64) for _ in range(3)))


class WorkLists:
    """The items of a batch for layers of one shape, in int32 memory: `counts` (items of block_m rows, items of decode_m
    rows, tokens to fold), `walk`, `decode` [.., ITEM], `turns` [.., TURN] and `parts` (the lists of the turns)."""

    def __init__(self, device: torch.device, group: int, num_kv_heads: int, window: int, tiles: Tiles) -> None:
        self._group, self._num_kv_heads, self._window, self._tiles = group, num_kv_heads, window, tiles
        self._buffers = [Buffer(device) for _ in range(5)]
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
        walk = num_sequences + num_tokens * self._group // per_tile + tiles.partials
        sizes = (3, ITEM * walk, ITEM * (num_sequences + tiles.partials), TURN * tiles.partials, tiles.partials)
        for buffer, size in zip(self._buffers, sizes, strict=True):
            buffer.reserve(size)
            buffer.fixed = True

    def update(self, segments: Segments) -> None:
        """Takes in a batch."""
        tiles = self._tiles
        few = segments.num_tokens * self._group <= tiles.decode_m
        tilings = self._tiling(segments, ~few, tiles.block_m), self._tiling(segments, few, tiles.decode_m)
        work = int(tilings[0].num_splits.sum()) * self._num_kv_heads
        longest = max(1, -(-work // tiles.programs))  # splits that one program may walk through and be in time
        self.num_partials = 0
        turns, parts = [np.zeros((0, TURN))], [np.zeros(0)]
        decode = self._deal(tilings[1], self._groups(segments, few), 1, turns, parts)
        walk = self._deal(tilings[0], _Groups.none(len(tilings[0].table)), longest, turns, parts)
        several = decode[:, 3] // tiles.split < (decode[:, 4] - 1) // tiles.split  # splits: there was no room for parts
        lists = [_heaviest_first(each) for each in (np.concatenate([walk, decode[several]]), decode[~several])]
        every_turn = np.concatenate(turns)
        self.num_walk, self.num_decode, self.num_turns = len(lists[0]), len(lists[1]), len(every_turn)
        counts = np.array([self.num_walk, self.num_decode, self.num_turns])
        for buffer, values in zip(self._buffers, (counts, *lists, every_turn, np.concatenate(parts)), strict=True):
            buffer.write(values)

    def _tiling(self, segments: Segments, chosen: np.ndarray, block: int) -> _Tiling:
        group, tiles = self._group, self._tiles
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

    def _groups(self, segments: Segments, few: np.ndarray) -> _Groups:
        """Neighbours among segments of few rows, each of which is one tile, that share whole splits."""
        which = np.flatnonzero((segments.num_tokens > 0) & few)
        tokens = segments.num_tokens[which]
        capacity = self._tiles.decode_m // self._group // max(1, int(tokens.max(initial=1)))
        if capacity < 2 or self._window or len(which) < 2:
            return _Groups.none(len(which))
        seen = segments.first_last_key[which] + 1
        shared = np.minimum(segments.shared_keys[which[:-1]], np.minimum(seen[:-1], seen[1:])) // self._tiles.split
        shared = np.where(np.diff(which) == 1, shared, 0)
        run = np.concatenate([[0], np.cumsum(shared == 0)])  # of neighbours that share anything
        leader = np.searchsorted(run, run)
        leader += (np.arange(len(which)) - leader) // capacity * capacity
        inner = leader[1:] == leader[:-1]  # both in one group
        starts = np.flatnonzero(np.concatenate([[True], ~inner]))
        least = np.minimum.reduceat(
            np.concatenate([[np.iinfo(np.int64).max], np.where(inner, shared, np.iinfo(np.int64).max)]), starts
        )
        sizes = np.diff(np.concatenate([starts, [len(which)]]))
        group = np.repeat(np.arange(len(starts)), sizes)
        return _Groups(
            leader, np.where(sizes > 1, least, 0)[group], np.add.reduceat(tokens, starts)[group],
            np.cumsum(tokens) - tokens - (np.cumsum(tokens) - tokens)[leader],
        )  # fmt: skip

    def _deal(self, tiling: _Tiling, groups: _Groups, longest: int, turns: list[np.ndarray],
              parts: list[np.ndarray]) -> np.ndarray:  # fmt: skip
        """Items; tiles of more than `longest` splits become an item each split."""
        split, group = self._tiles.split, self._group
        tokens, leads = tiling.num_rows // group, groups.leader == np.arange(len(groups.leader))
        own, common = tokens * (tiling.num_splits - groups.num_splits), groups.num_tokens * groups.num_splits
        need = own + common * leads
        cut = ((tiling.num_splits > longest) | (groups.num_splits > 0)) & (tiling.num_rows % group == 0)
        cut &= np.cumsum(need * cut) + self.num_partials <= self._tiles.partials
        whole = np.flatnonzero(~cut)
        items = [tiling.items(whole, tiling.key_begin[whole], tiling.key_end[whole], np.full(len(whole), -1))]
        if cut.any():
            base = self.num_partials + np.cumsum(need * cut) - need * cut  # a leader's common results, then its own
            own_base = base + common * leads
            which = np.flatnonzero(cut & leads & (common > 0))
            tile, number = _each(which, groups.num_splits)
            shared = tiling.items(
                tile, number * split, (number + 1) * split, base[tile] + number * groups.num_tokens[tile]
            )
            shared[:, 1] = groups.num_tokens[tile] * group
            which = np.flatnonzero(cut)
            tile, number = _each(which, tiling.num_splits - groups.num_splits)
            begin = (tiling.key_begin[tile] // split + groups.num_splits[tile] + number) * split
            end = np.minimum(begin + split, tiling.key_end[tile])
            part = own_base[tile] + number * tokens[tile]
            items += [shared, tiling.items(tile, np.maximum(begin, tiling.key_begin[tile]), end, part)]
            tile, token = _each(which, tokens)
            length = tiling.num_splits[tile]
            before = np.cumsum(length) - length
            turns.append(np.stack([tiling.first_row[tile] // group + token, sum(map(len, parts)) + before, length], 1))
            number = np.arange(length.sum()) - np.repeat(before, length)
            tile, token = np.repeat(tile, length), np.repeat(token, length)
            in_group = base[groups.leader[tile]] + number * groups.num_tokens[tile] + groups.tokens_before[tile] + token
            alone = own_base[tile] + (number - groups.num_splits[tile]) * tokens[tile] + token
            parts.append(np.where(number < groups.num_splits[tile], in_group, alone))
            self.num_partials += int((need * cut).sum())
        return np.concatenate(items)


def _heaviest_first(items: np.ndarray) -> np.ndarray:
    return items[np.argsort(items[:, 3] - items[:, 4], kind="stable")]


def _each(which: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """which[i] counts[which[i]] times, for all i, and 0, 1, 2, .. along with it."""
    lengths = counts[which]
    return np.repeat(which, lengths), np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
