"""What the forward receives: tokens packed end to end, and where their keys and values live.

# T tokens, S sequences
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.attention import AttentionPlan
from engine.kernels.memory import CPU, upload
from engine.parallel.collectives import Group
from engine.parallel.context import ContextShard, deal_rows


@dataclass
class KVView:
    """The pages keys and values are written to and read from: `keys[l]`, `values[l]` are those of layer l, in the
    attention kernel's own layout. Which page holds what is in the batch's plan."""

    keys: list[Tensor]
    values: list[Tensor]


@dataclass
class TokenBatch:
    """Tokens of S sequences packed end to end, [T]. There is no padding and no batch dimension.

    `plan` says which rows belong to which sequence, at which positions, and which pages hold their keys; every layer
    reads it. Training and scoring leave `kv` as None: keys and values then live only as long as a layer needs them.
    `scattered`: between matmuls each tensor-parallel rank keeps its share of the rows only (sequence parallel).
    `context`: the tokens are those of a context-parallel rank, or of one of its lanes, and the plan is that of their
    queries.
    """

    tokens: Tensor  # int32 [T]
    plan: AttentionPlan
    kv: KVView | None = None
    scattered: bool = False
    context: ContextShard | None = None

    @property
    def num_tokens(self) -> int:
        return self.tokens.shape[0]

    @property
    def scattered_rows(self) -> int | None:
        """The number of rows that are dealt over tensor-parallel ranks; None where every rank has them all."""
        return self.num_tokens if self.scattered else None

    @classmethod
    def packed(
        cls,
        sequences: list[list[int]],
        scattered: bool = False,
        context: Group | None = None,
        device: torch.device = CPU,
    ) -> TokenBatch:
        """Whole sequences, positions from 0, no cache: what training and scoring use, with the tokens on `device`. With
        a `context` of several ranks, the rows of them that this rank computes."""
        (batch,) = cls.lanes(sequences, scattered, context, 1, device)
        return batch

    @classmethod
    def lanes(
        cls,
        sequences: list[list[int]],
        scattered: bool,
        context: Group | None,
        each: int,
        device: torch.device = CPU,
    ) -> list[TokenBatch]:
        """The same rows as the lanes whose gradients are summed by themselves: `each` on each rank of `context`."""
        lengths = [len(s) for s in sequences]
        tokens = torch.tensor([t for s in sequences for t in s], dtype=torch.int32)
        context = context or Group("cp")
        if context.size * each == 1:
            return [cls(upload(tokens, device), AttentionPlan.of_sequences(lengths, device), scattered=scattered)]
        shard = ContextShard(context, deal_rows(lengths, context.size * each), lengths, device=device)
        return [
            cls(upload(tokens[lane.rows], device), lane.plan, scattered=scattered, context=shard)
            for lane in shard.lanes
        ]
