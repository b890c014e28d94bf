"""Context parallelism: each rank computes some rows of every long sequence, and keys and values travel.

A long sequence is cut into 2p chunks; rank r takes chunks r and 2p - 1 - r, which together see as many keys as any
other such pair (arXiv 2407.21783, section 3.3.2):

    keys ->   0   1   2   3         p = 2: chunks 0 and 3 are rank 0's, 1 and 2 are rank 1's
    chunk 0   #   .   .   .   r0    each row is computed whole, by the kernel and in the order of any other row, so its
    chunk 1   #   #   .   .   r1    bits are those it has on one rank
    chunk 2   #   #   #   .   r1
    chunk 3   #   #   #   #   r0

Short sequences stay whole on the least loaded rank, and what stays does not travel. Before attention every rank gets
the key and value columns of all rows that were dealt out; their gradients go back and are summed in rank order.

A sum over tokens is then grouped by rank. Where it must not depend on the number of ranks, rows are dealt to more lanes
than there are ranks, and a rank plays several lanes: each has its own rows, its own keys and its own gradients of the
weights, as if it were a rank.

# p ranks, k lanes of a rank, T rows of a lane, W rows of the whole batch, T_kv rows whose keys a lane holds
# N chosen rows
# H query heads, K key/value heads, Dh head width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.kernels.attention import AttentionPlan, AttentionSpec
from engine.kernels.graph import empty
from engine.kernels.memory import CPU, upload
from engine.parallel.collectives import Group, all_to_all, fold

Segment = tuple[int, int]  # rows [begin, end) of the whole batch

_TOKEN_WORK = 8192  # what a token costs besides attention, in keys: 6 D and more, for D of 1,000 and up
_IMBALANCE = 1.1  # the busiest rank's work over the mean's that is fine if it saves a sequence its travel


@dataclass(frozen=True)
class Deal:
    """`segments[i]`: the rows of lane i, in their order. `cut[s]`: whether sequence s may be in several lanes."""

    segments: list[list[Segment]]
    cut: list[bool]


def deal_rows(lengths: Sequence[int], num_lanes: int, before: Sequence[int] | None = None) -> Deal:
    """Deals the rows of packed sequences to lanes (ranks, or several for each rank) with balanced causal work; a
    function of the arguments alone.

    As few sequences are cut as balance allows, the longest first; the others go whole to the least loaded lane.
    `before[s]` keys of sequence s are in a cache.
    """
    before = before or [0] * len(lengths)
    longest = sorted(range(len(lengths)), key=lambda s: (-lengths[s], s))
    mean = sum(map(_work, lengths, before)) / num_lanes
    count = 0
    while True:
        owned, loads = _deal(lengths, before, longest, count, num_lanes)
        if count == len(lengths) or max(loads) <= _IMBALANCE * mean:
            break
        count = min(len(lengths), 2 * count or 1)
    cut = [False] * len(lengths)
    for s in longest[:count]:
        cut[s] = num_lanes > 1
    return Deal([sorted(segments) for segments in owned], cut)


def _deal(
    lengths: Sequence[int], before: Sequence[int], longest: list[int], count: int, num_lanes: int
) -> tuple[list[list[Segment]], list[float]]:
    """Segments and work of each lane when the `count` longest sequences are cut."""
    starts = list(accumulate(lengths, initial=0))
    owned: list[list[Segment]] = [[] for _ in range(num_lanes)]
    loads = [0.0] * num_lanes
    for s in longest[:count]:
        edges = [lengths[s] * i // (2 * num_lanes) for i in range(2 * num_lanes + 1)]
        for lane in range(num_lanes):
            low, high = edges[lane : lane + 2], edges[2 * num_lanes - 1 - lane :][:2]
            for begin, end in [(low[0], high[1])] if low[1] == high[0] else [low, high]:
                loads[lane] += _work(end, before[s]) - _work(begin, before[s])
                if end > begin:
                    owned[lane].append((starts[s] + begin, starts[s] + end))
    for s in longest[count:]:
        lane = loads.index(min(loads))
        loads[lane] += _work(lengths[s], before[s])
        owned[lane].append((starts[s], starts[s] + lengths[s]))
    return owned, loads


def _work(length: int, before: int) -> float:
    """What `length` tokens of a sequence cost after the first `before`, in keys."""
    return length * (_TOKEN_WORK + before + length / 2)


class ContextLane:
    """The rows of one lane, and which rows' keys it holds: those of the sequences that were cut, and of its own."""

    def __init__(
        self,
        segments: list[Segment],
        travelling: np.ndarray,
        lengths: Sequence[int],
        cut: np.ndarray,
        plan: AttentionPlan | None,
        device: torch.device,
    ) -> None:
        """`segments` are its rows, `travelling` those rows of all lanes that travel, lane after lane, `cut` (bool [S])
        the sequences that these are of. `plan` is of all rows, or None for sequences from position 0 without a
        cache. The rows' keys lie on `device`."""
        starts = np.array(list(accumulate(lengths, initial=0)))
        travels = np.repeat(cut, lengths)  # [W]
        own = _rows(segments)
        held = cut.copy()
        held[np.searchsorted(starts, own, side="right") - 1] = True
        kv_rows = np.flatnonzero(np.repeat(held, lengths))  # [T_kv]
        self.rows = torch.from_numpy(own)  # int64 [T], ascending, on the CPU
        moving, staying = np.flatnonzero(travels[own]), np.flatnonzero(~travels[own])
        received_at, staying_at = np.searchsorted(kv_rows, travelling), np.searchsorted(kv_rows, own[~travels[own]])
        self.moving = upload(torch.from_numpy(moving), device)  # own rows that travel, as rows of T
        self.staying = upload(torch.from_numpy(staying), device)
        self.received_at = upload(torch.from_numpy(received_at), device)  # as rows of T_kv
        self.staying_at = upload(torch.from_numpy(staying_at), device)
        self.num_keys = len(kv_rows)

        if plan is None:
            plan = AttentionPlan.of_sequences(np.array(lengths)[held].tolist(), device)
        begins, ends = np.array(segments, dtype=np.int64).reshape(-1, 2).T
        at = np.searchsorted(kv_rows, begins)
        self.plan = AttentionPlan(plan, device)
        self.plan.build_segments(at.astype(np.int32), (at + ends - begins).astype(np.int32))


class ContextShard:
    """One rank's rows of a batch, lane after lane, and what it takes to give them their keys and to put results in
    order again."""

    def __init__(
        self,
        group: Group,
        deal: Deal,
        lengths: Sequence[int],
        plan: AttentionPlan | None = None,
        device: torch.device = CPU,
    ) -> None:
        """Rank r has lanes [k r, k (r + 1)) of the p k that `deal` is for. `lengths`: rows of each sequence. They run
        from position 0 without a cache, unless `plan` of all rows says otherwise: then all keys travel, because every
        rank has a cache to write them to. Keys and their gradients lie on `device`."""
        self.group = group
        cut = np.array(deal.cut, dtype=bool) if plan is None else np.ones(len(lengths), dtype=bool)
        travels = np.repeat(cut, lengths)
        self.num_lanes = len(deal.segments) // group.size  # of each rank
        self.first_lane = self.num_lanes * group.index
        self.owner = torch.empty(sum(lengths), dtype=torch.int32)  # [W] lane of each row
        moving = []
        for lane, rows in enumerate(map(_rows, deal.segments)):
            self.owner[torch.from_numpy(rows)] = lane
            moving.append(rows[travels[rows]])
        self.counts = [  # travelling rows of each rank
            sum(map(len, moving[lane : lane + self.num_lanes])) for lane in range(0, len(moving), self.num_lanes)
        ]
        mine = deal.segments[self.first_lane : self.first_lane + self.num_lanes]
        self.lanes = [ContextLane(segments, np.concatenate(moving), lengths, cut, plan, device) for segments in mine]

    def gather_keys(self, own: Sequence[Tensor]) -> list[Tensor]:
        """Key and value columns of each lane's rows, to those of all rows of its keys' plan: k of [T, 2K Dh] -> k of
        [T_kv, 2K Dh]."""
        kv = [
            empty((lane.num_keys, rows.shape[1]), rows.dtype, rows.device)
            for lane, rows in zip(self.lanes, own, strict=True)
        ]
        if any(self.counts):
            size = self.group.size
            moving = _joined([rows.index_select(0, lane.moving) for lane, rows in zip(self.lanes, own, strict=True)])
            everyone = all_to_all(moving.repeat(size, 1), self.group, [len(moving)] * size, self.counts)
            for lane, keys in zip(self.lanes, kv, strict=True):
                keys.index_copy_(0, lane.received_at, everyone)
        for lane, keys, rows in zip(self.lanes, kv, own, strict=True):
            keys.index_copy_(0, lane.staying_at, rows.index_select(0, lane.staying))
        return kv

    def sum_gradients(self, d_kv: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Back from `gather_keys`: k of [T_kv, 2K Dh], each lane's part of the gradient, to its sum over all lanes, in
        their order, for own rows, written to `out`, k of [T, 2K Dh]."""
        if any(self.counts):
            size, lanes, columns = self.group.size, self.num_lanes, d_kv[0].shape[1]
            parts = [part.index_select(0, lane.received_at) for lane, part in zip(self.lanes, d_kv, strict=True)]
            if lanes > 1:  # all lanes' parts for rank 0, then for rank 1, ...
                parts = [x for blocks in zip(*(part.split(self.counts) for part in parts), strict=True) for x in blocks]
            moving = [len(lane.moving) for lane in self.lanes]
            counts, count = [n * lanes for n in self.counts], sum(moving)
            received = all_to_all(_joined(parts), self.group, counts, [count * lanes] * size)
            del parts
            total = fold(received.view(size * lanes, count, columns))
            for lane, rows, piece in zip(self.lanes, out, total.split(moving), strict=True):
                rows[lane.moving] = piece.to(rows.dtype)
        for lane, part, rows in zip(self.lanes, d_kv, out, strict=True):
            rows[lane.staying] = part.index_select(0, lane.staying_at)


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


def _rows(segments: list[Segment]) -> np.ndarray:
    return np.concatenate([np.arange(0), *(np.arange(begin, end) for begin, end in segments)])


def share_keys(qkv: Sequence[Tensor], spec: AttentionSpec, shard: ContextShard) -> tuple[list[Tensor], list[Tensor]]:
    """Each lane's queries, [T, H Dh], and the keys and values they may see, [T_kv, 2K Dh], from its rows of qkv
    [T, (H + 2K) Dh]: what `attention` takes with the lane's plan. Raises ParallelError."""
    if torch.is_grad_enabled() and qkv[0].requires_grad:
        both = _ShareKeys.apply(spec, shard, *qkv)
        return list(both[: len(qkv)]), list(both[len(qkv) :])
    queries = spec.num_heads * spec.head_dim
    return [rows[:, :queries] for rows in qkv], shard.gather_keys([rows[:, queries:] for rows in qkv])


class _ShareKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: AttentionSpec, shard: ContextShard, *qkv: Tensor) -> tuple[Tensor, ...]:
        ctx.shard, ctx.row_size, ctx.queries = shard, spec.row_size, spec.num_heads * spec.head_dim
        kv = shard.gather_keys([rows[:, ctx.queries :] for rows in qkv])
        return (*(rows[:, : ctx.queries] for rows in qkv), *kv)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        d_q, d_kv = gradients[: ctx.shard.num_lanes], gradients[ctx.shard.num_lanes :]
        d_qkv = [empty((queries.shape[0], ctx.row_size), queries.dtype, queries.device) for queries in d_q]
        for whole, queries in zip(d_qkv, d_q, strict=True):
            whole[:, : ctx.queries] = queries
        ctx.shard.sum_gradients(d_kv, [whole[:, ctx.queries :] for whole in d_qkv])
        return (None, None, *d_qkv)


@dataclass(frozen=True)
class Choice:
    """N rows of the whole batch that something is computed for, each on the rank that has it."""

    group: Group
    num_lanes: int  # of all ranks
    owner: Tensor  # int32 [N] lane
    mine: Tensor  # int64: which of the N are this rank's, lane after lane
    local: Tensor  # int64: where these are among its rows
    counts: list[int]  # how many each lane of this rank has

    def take(self, hidden: Tensor) -> Tensor:
        """The chosen ones of this rank's rows."""
        if len(self.local) == hidden.shape[0]:
            return hidden
        return hidden.index_select(0, upload(self.local, hidden.device))

    def whole(self, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        """Those of this rank's chosen rows to those of all N, in order, on every rank. Every rank goes on with all of
        them alike, so a gradient comes back without a sum. Raises ParallelError."""
        if self.num_lanes == 1:
            return logprobs, entropy
        stacked = torch.stack([logprobs, entropy], 1)
        whole = _Whole.apply(stacked, self) if stacked.requires_grad else self.gather(stacked)
        return whole[:, 0], whole[:, 1]

    def gather(self, own: Tensor) -> Tensor:
        size, each = self.group.size, self.num_lanes // self.group.size
        owners = [(self.owner == lane).nonzero().flatten() for lane in range(self.num_lanes)]
        counts = [sum(map(len, owners[first : first + each])) for first in range(0, self.num_lanes, each)]
        received = all_to_all(own.repeat(size, 1), self.group, [len(own)] * size, counts)
        whole = own.new_empty((len(self.owner), own.shape[1]))
        return whole.index_copy_(0, upload(torch.cat(owners), own.device), received)


def choose_rows(rows: Tensor, shard: ContextShard | None) -> Choice:
    """`rows` (int64 [N], ascending) of the whole batch; without a shard this rank has them all."""
    if shard is None:
        here = torch.arange(len(rows))
        return Choice(Group("cp"), 1, torch.zeros(len(rows), dtype=torch.int32), here, rows, [len(rows)])
    owner = shard.owner[rows]
    mine, local, before = [], [], 0
    for number, lane in enumerate(shard.lanes, shard.first_lane):
        mine.append((owner == number).nonzero().flatten())
        local.append(before + torch.searchsorted(lane.rows, rows[mine[-1]]))
        before += len(lane.rows)
    num_lanes, counts = shard.num_lanes * shard.group.size, [len(each) for each in mine]
    return Choice(shard.group, num_lanes, owner, torch.cat(mine), torch.cat(local), counts)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, choice: Choice) -> Tensor:
        ctx.choice = choice
        return choice.gather(own)

    @staticmethod
    def backward(ctx: Any, d_whole: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return d_whole.index_select(0, upload(ctx.choice.mine, d_whole.device)), None
