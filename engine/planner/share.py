"""One rank's share of a model and of a micro-batch: the sizes that bytes and FLOPs are computed from.

They come from the functions that the engine itself deals weights and rows with (`parallel/shards.py`,
`parallel/context.py`), so a plan and the ranks it describes cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from engine.config import EngineConfig, ModelConfig
from engine.parallel.context import deal_rows
from engine.parallel.mesh import Mesh
from engine.parallel.shards import HeadShard, Placement, head_shard, layer_chunks, row_shard

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # float64 is for tests of the engine, not for plans


@dataclass(frozen=True)
class Rows:
    """A context-parallel rank's part of a micro-batch."""

    lanes: tuple[int, ...]  # rows it computes, of each of its lanes
    keys: int  # rows whose keys and values its lanes have gathered; 0 without context parallelism
    sent: int  # of its rows, those whose keys and values every other rank gets
    received: int  # rows of other ranks whose keys and values it gets

    @property
    def tokens(self) -> int:
        """T: rows it computes."""
        return sum(self.lanes)


@dataclass(frozen=True)
class Share:
    """The rank at `placement`, with micro-batches of `train_batch_tokens` in sequences of `sequence_tokens`.

    The properties raise ConfigError where heads, panels of rows or layers cannot be dealt to so many ranks.
    """

    model: ModelConfig
    config: EngineConfig
    placement: Placement
    sequence_tokens: int

    @property
    def mesh(self) -> Mesh:
        return self.placement.mesh

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.config.dtype]

    @property
    def e(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    # ---- of the model ----

    @cached_property
    def heads(self) -> HeadShard:
        return head_shard(self.model, self.mesh.tp.size, self.mesh.tp.index)

    @property
    def H(self) -> int:
        return self.heads.heads.size

    @property
    def K(self) -> int:
        return self.heads.kv_heads.size

    @property
    def Dh(self) -> int:
        return self.model.head_dim

    @property
    def D(self) -> int:
        return self.model.hidden_size

    @cached_property
    def I(self) -> int:  # noqa: E743 (the legend's name)
        return row_shard(self.model.intermediate_size, self.mesh.tp.size, self.mesh.tp.index).size

    @cached_property
    def V(self) -> int:
        return row_shard(self.model.vocab_size, self.mesh.tp.size, self.mesh.tp.index).size

    @property
    def qkv(self) -> int:
        """Columns of the fused matrix: (H + 2 K) Dh."""
        return (self.H + 2 * self.K) * self.Dh

    @cached_property
    def chunks(self) -> list[range]:
        """The layers of each chunk."""
        pp = self.mesh.pp
        return layer_chunks(self.model.num_hidden_layers, pp.size, self.placement.chunks_per_stage, pp.index)

    @property
    def num_layers(self) -> int:
        return sum(len(layers) for layers in self.chunks)

    @property
    def is_first(self) -> bool:
        """Whether the embedding is here."""
        return self.mesh.pp.index == 0

    @property
    def is_last(self) -> bool:
        """Whether the last norm and the head are here."""
        return self.mesh.pp.index == self.mesh.pp.size - 1

    # ---- of a micro-batch ----

    @cached_property
    def rows(self) -> Rows:
        """What context parallelism deals to this rank: T of the micro-batch's tokens, and the keys it needs."""
        tokens, cp = self.config.train_batch_tokens, self.mesh.cp
        if cp.size * self.context_lanes == 1:
            return Rows((tokens,), 0, 0, 0)
        return dealt_rows(tokens, min(self.sequence_tokens, tokens), cp.size, cp.index, self.context_lanes)

    @property
    def context_lanes(self) -> int:
        """Lanes of a micro-batch on this rank, each with gradients of its own."""
        return (self.config.parallel.context_lanes or self.mesh.cp.size) // self.mesh.cp.size

    @property
    def T(self) -> int:
        return self.rows.tokens

    @property
    def S(self) -> int:
        """Rows that the rank keeps between matmuls: of each lane ceil(T / tp) under sequence parallelism, else T."""
        parts = self.mesh.tp.size if self.placement.sequence_parallel else 1
        return sum(-(-rows // parts) for rows in self.rows.lanes)


@lru_cache
def dealt_rows(tokens: int, sequence_tokens: int, num_ranks: int, index: int, lanes: int) -> Rows:
    """One rank's rows of a micro-batch of equal sequences (the last is what is left over), as the engine deals them."""
    lengths = [sequence_tokens] * (tokens // sequence_tokens)
    lengths += [tokens % sequence_tokens] if tokens % sequence_tokens else []
    deal = deal_rows(lengths, num_ranks * lanes)
    here = deal.segments[index * lanes : (index + 1) * lanes]
    travelling = sum(length for length, cut in zip(lengths, deal.cut, strict=True) if cut)
    whole = sum(_staying(segments, lengths, deal.cut) for segments in here)
    own = tuple(sum(end - begin for begin, end in segments) for segments in here)
    sent = sum(own) - whole
    return Rows(own, keys=lanes * travelling + whole, sent=sent, received=travelling - sent)


def _staying(segments: list[tuple[int, int]], lengths: list[int], cut: list[bool]) -> int:
    """Rows of a rank that belong to sequences that are not cut."""
    start, whole = 0, set()
    for length, is_cut in zip(lengths, cut, strict=True):
        if not is_cut:
            whole.add((start, start + length))
        start += length
    return sum(end - begin for begin, end in segments if (begin, end) in whole)
