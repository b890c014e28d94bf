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

# p ranks, T rows of a rank, W rows of the whole batch, T_kv rows whose keys a rank holds, N chosen rows
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
from engine.kernels.memory import upload
from engine.parallel.collectives import Group, all_to_all, fold

Segment = tuple[int, int]  # rows [begin, end) of the whole batch

_TOKEN_WORK = 8192  # what a token costs besides attention, in keys: 6 D and more, for D of 1,000 and up
_IMBALANCE = 1.1  # the busiest rank's work over the mean's that is fine if it saves a sequence its travel


@dataclass(frozen=True)
class Deal:
    """`segments[r]`: the rows of rank r, in their order. `cut[s]`: whether sequence s may be on several ranks."""

    segments: list[list[Segment]]
    cut: list[bool]


def deal_rows(lengths: Sequence[int], num_ranks: int, before: Sequence[int] | None = None) -> Deal:
    """Deals the rows of packed sequences to ranks with balanced causal work; a function of the arguments alone.

    As few sequences are cut as balance allows, the longest first; the others go whole to the least loaded rank.
    `before[s]` keys of sequence s are in a cache.
    """
    before = before or [0] * len(lengths)
    longest = sorted(range(len(lengths)), key=lambda s: (-lengths[s], s))
    mean = sum(map(_work, lengths, before)) / num_ranks
    count = 0
    while True:
        owned, loads = _deal(lengths, before, longest, count, num_ranks)
        if count == len(lengths) or max(loads) <= _IMBALANCE * mean:
            break
        count = min(len(lengths), 2 * count or 1)
    cut = [False] * len(lengths)
    for s in longest[:count]:
        cut[s] = num_ranks > 1
    return Deal([sorted(segments) for segments in owned], cut)


def _deal(
    lengths: Sequence[int], before: Sequence[int], longest: list[int], count: int, num_ranks: int
) -> tuple[list[list[Segment]], list[float]]:
    """Segments and work of each rank when the `count` longest sequences are cut."""
    starts = list(accumulate(lengths, initial=0))
    owned: list[list[Segment]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for s in longest[:count]:
        edges = [lengths[s] * i // (2 * num_ranks) for i in range(2 * num_ranks + 1)]
        for rank in range(num_ranks):
            low, high = edges[rank : rank + 2], edges[2 * num_ranks - 1 - rank :][:2]
            for begin, end in [(low[0], high[1])] if low[1] == high[0] else [low, high]:
                loads[rank] += _work(end, before[s]) - _work(begin, before[s])
                if end > begin:
                    owned[rank].append((starts[s] + begin, starts[s] + end))
    for s in longest[count:]:
        rank = loads.index(min(loads))
        loads[rank] += _work(lengths[s], before[s])
        owned[rank].append((starts[s], starts[s] + lengths[s]))
    return owned, loads


def _work(length: int, before: int) -> float:
    """What `length` tokens of a sequence cost after the first `before`, in keys."""
    return length * (_TOKEN_WORK + before + length / 2)


class ContextShard:
    """One rank's rows of a batch, and what it takes to give them their keys and to put results in order again."""

    def __init__(self, group: Group, deal: Deal, lengths: Sequence[int], plan: AttentionPlan | None = None) -> None:
        """`lengths`: rows of each sequence. They run from position 0 without a cache, unless `plan` of all rows says
        otherwise: then all keys travel, because every rank has a cache to write them to."""
        self.group = group
        starts = np.array(list(accumulate(lengths, initial=0)))
        cut = np.array(deal.cut, dtype=bool) if plan is None else np.ones(len(lengths), dtype=bool)
        travels = np.repeat(cut, lengths)  # [W]
        everyone = [_rows(segments) for segments in deal.segments]
        own = everyone[group.index]
        self.owner = torch.empty(int(starts[-1]), dtype=torch.int32)  # [W] rank of each row
        for rank, rows in enumerate(everyone):
            self.owner[torch.from_numpy(rows)] = rank
        self.rows = torch.from_numpy(own)  # int64 [T] this rank's rows, ascending

        # The rank holds keys of the sequences that were cut, and of its own.
        held = cut.copy()
        held[np.searchsorted(starts, own, side="right") - 1] = True
        kv_rows = np.flatnonzero(np.repeat(held, lengths))  # [T_kv]
        moving = [rows[travels[rows]] for rows in everyone]
        self.counts = [len(rows) for rows in moving]  # travelling rows of each rank
        self.moving = torch.from_numpy(np.flatnonzero(travels[own]))  # own rows that travel, as rows of T
        self.staying = torch.from_numpy(np.flatnonzero(~travels[own]))
        self.received_at = torch.from_numpy(np.searchsorted(kv_rows, np.concatenate(moving)))  # as rows of T_kv
        self.staying_at = torch.from_numpy(np.searchsorted(kv_rows, own[~travels[own]]))
        self.num_keys = len(kv_rows)

        if plan is None:
            plan = AttentionPlan.of_sequences(np.array(lengths)[held].tolist())
        begins, ends = np.array(deal.segments[group.index], dtype=np.int64).reshape(-1, 2).T
        at = np.searchsorted(kv_rows, begins)
        self.plan = AttentionPlan(plan)
        self.plan.build_segments(at.astype(np.int32), (at + ends - begins).astype(np.int32))

    def gather_keys(self, own: Tensor) -> Tensor:
        """Key and value columns of all rows of the keys' plan: [T, 2K Dh] -> [T_kv, 2K Dh]."""
        kv = empty((self.num_keys, own.shape[1]), own.dtype)
        if any(self.counts):
            size, count = self.group.size, len(self.moving)
            copies = own.index_select(0, self.moving).repeat(size, 1)
            kv.index_copy_(0, self.received_at, all_to_all(copies, self.group, [count] * size, self.counts))
        return kv.index_copy_(0, self.staying_at, own.index_select(0, self.staying))

    def sum_gradients(self, d_kv: Tensor, out: Tensor) -> None:
        """Back from `gather_keys`: [T_kv, 2K Dh], each rank's part of the gradient, to its sum over ranks for own rows,
        written to `out` [T, 2K Dh]."""
        if any(self.counts):
            size, count = self.group.size, len(self.moving)
            parts = all_to_all(d_kv.index_select(0, self.received_at), self.group, self.counts, [count] * size)
            out[self.moving] = fold(parts.view(size, count, d_kv.shape[1])).to(out.dtype)
        out[self.staying] = d_kv.index_select(0, self.staying_at)


def _rows(segments: list[Segment]) -> np.ndarray:
    return np.concatenate([np.arange(0), *(np.arange(begin, end) for begin, end in segments)])


def share_keys(qkv: Tensor, spec: AttentionSpec, shard: ContextShard) -> tuple[Tensor, Tensor]:
    """This rank's queries, [T, H Dh], and the keys and values they may see, [T_kv, 2K Dh], from its rows of qkv
    [T, (H + 2K) Dh]: what `attention` takes with `shard.plan`. Raises ParallelError."""
    if torch.is_grad_enabled() and qkv.requires_grad:
        return _ShareKeys.apply(qkv, spec, shard)
    queries = spec.num_heads * spec.head_dim
    return qkv[:, :queries], shard.gather_keys(qkv[:, queries:])


class _ShareKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, spec: AttentionSpec, shard: ContextShard) -> tuple[Tensor, Tensor]:
        ctx.shard, ctx.row_size, ctx.queries = shard, spec.row_size, spec.num_heads * spec.head_dim
        return qkv[:, : ctx.queries], shard.gather_keys(qkv[:, ctx.queries :])

    @staticmethod
    def backward(ctx: Any, d_q: Tensor, d_kv: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        d_qkv = empty((d_q.shape[0], ctx.row_size), d_q.dtype)
        d_qkv[:, : ctx.queries] = d_q
        ctx.shard.sum_gradients(d_kv, d_qkv[:, ctx.queries :])
        return d_qkv, None, None


@dataclass(frozen=True)
class Choice:
    """N rows of the whole batch that something is computed for, each on the rank that has it."""

    group: Group
    owner: Tensor  # int32 [N]
    mine: Tensor  # int64: which of the N are this rank's
    local: Tensor  # int64: where these are among its rows

    def take(self, hidden: Tensor) -> Tensor:
        """The chosen ones of this rank's rows."""
        if len(self.local) == hidden.shape[0]:
            return hidden
        return hidden.index_select(0, upload(self.local, hidden.device))

    def whole(self, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        """Those of this rank's chosen rows to those of all N, in order, on every rank. Every rank goes on with all of
        them alike, so a gradient comes back without a sum. Raises ParallelError."""
        if self.group.size == 1:
            return logprobs, entropy
        stacked = torch.stack([logprobs, entropy], 1)
        whole = _Whole.apply(stacked, self) if stacked.requires_grad else self.gather(stacked)
        return whole[:, 0], whole[:, 1]

    def gather(self, own: Tensor) -> Tensor:
        size = self.group.size
        owners = [(self.owner == rank).nonzero().flatten() for rank in range(size)]
        counts = [len(rows) for rows in owners]
        received = all_to_all(own.repeat(size, 1), self.group, [len(own)] * size, counts)
        return torch.empty((len(self.owner), own.shape[1]), dtype=own.dtype).index_copy_(0, torch.cat(owners), received)


def choose_rows(rows: Tensor, shard: ContextShard | None) -> Choice:
    """`rows` (int64 [N], ascending) of the whole batch; without a shard this rank has them all."""
    if shard is None:
        return Choice(Group("cp"), torch.zeros(len(rows), dtype=torch.int32), torch.arange(len(rows)), rows)
    owner = shard.owner[rows]
    mine = (owner == shard.group.index).nonzero().flatten()
    return Choice(shard.group, owner, mine, torch.searchsorted(shard.rows, rows[mine]))


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, choice: Choice) -> Tensor:
        ctx.choice = choice
        return choice.gather(own)

    @staticmethod
    def backward(ctx: Any, d_whole: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return d_whole.index_select(0, ctx.choice.mine), None
