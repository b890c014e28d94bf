"""Who steps which rows (ZeRO-1, arXiv 1910.02054), by the functions that the engine deals them with.

As in `parallel/ownership.py`: weights are cut into blocks of rows, a bucket is the blocks of a layer, of the head or of
the embedding, and the blocks of each bucket are dealt to the dp x cp ranks that hold the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch

from engine.kernels.memory import num_bytes
from engine.kernels.weight import Weight, storage_shape
from engine.parallel import ownership
from engine.parallel.data import in_place
from engine.parallel.ownership import deal_blocks, row_blocks
from engine.planner.footprint import FP32, Held, end_weights, layer_weights
from engine.planner.share import Share

Blocks = tuple[tuple[int, int], ...]  # of a bucket: elements and bytes of compute weights of each block


@dataclass(frozen=True)
class Owned:
    """What one rank steps: elements, bytes of their compute weights, and elements of the tied embedding among them."""

    elements: int
    weight_bytes: int
    tied_elements: int


@dataclass(frozen=True)
class _Rows:
    """Rows of a weight as a checkpoint's tensor has them: see `Part`."""

    weight: Weight
    row: int
    shape: tuple[int, ...]
    owned: bool


@dataclass(frozen=True)
class Buckets:
    """What decides the deal: a layer's weights and how many layers, the ends, and where blocks are cut."""

    layer: tuple[Held, ...]
    ends: tuple[Held, ...]
    num_layers: int
    query_rows: int
    keys_counted: bool
    dtype: torch.dtype
    tied: bool  # the embedding is the head, here or on another stage
    block_elements: int

    def blocks(self, weights: tuple[Held, ...]) -> Blocks:
        """A bucket's blocks. Rows of key/value heads that are another rank's to count are never in one with queries."""
        sizes = []
        for block in (piece for weight in weights for piece in row_blocks(self._parts(weight), self.block_elements)):
            shape = (block.rows, *block.weight.shape[1:])
            sizes.append((block.size, num_bytes(storage_shape(shape, self.dtype, block.weight.packed), self.dtype)))
        return tuple(sizes)

    def all(self) -> tuple[list[Blocks], int | None]:
        """Every bucket that is stepped, in the order in which a backward is through with them, and which of them is
        dealt first because it is tied."""
        ends = {weight.name: weight for weight in self.ends}
        found = [self.blocks((ends["head"],))] if "head" in ends else []
        with_norm = len(found)
        found += [self.blocks(self.layer)] * self.num_layers
        if "last norm" in ends:
            found[with_norm] = self.blocks((*self.layer, ends["last norm"]))
        if "embedding" in ends:
            found.append(self.blocks((ends["embedding"],)))
        first = len(found) - 1 if "embedding" in ends else 0
        return found, first if self.tied else None

    def _parts(self, held: Held) -> list[_Rows]:
        weight, rest = cast(Weight, held), held.shape[1:]  # its shape is all that blocks are made of
        if not held.name.startswith("qkv"):
            return [_Rows(weight, 0, held.shape, True)]
        keys = held.shape[0] - self.query_rows
        return [
            _Rows(weight, 0, (self.query_rows, *rest), True),
            _Rows(weight, self.query_rows, (keys, *rest), self.keys_counted),
        ]


def buckets(share: Share) -> Buckets:
    """Those of one rank."""
    return Buckets(
        layer=tuple(layer_weights(share)),
        ends=tuple(end_weights(share)),
        num_layers=share.num_layers,
        query_rows=share.H * share.Dh,
        keys_counted=share.heads.owned,
        dtype=share.dtype,
        tied=share.model.tie_word_embeddings and (share.is_first or share.is_last),
        block_elements=ownership.BLOCK_ELEMENTS,
    )


def owned_by_each(share: Share) -> tuple[Owned, ...]:
    """What each of the dp x cp ranks that hold these weights steps."""
    return _deal(buckets(share), share.mesh.data.size)


def owned(share: Share) -> Owned:
    """What this rank steps."""
    return owned_by_each(share)[share.mesh.data.index]


@lru_cache(maxsize=4096)
def _deal(buckets: Buckets, num_ranks: int) -> tuple[Owned, ...]:
    found, first = buckets.all()
    loads, weight_bytes, tied_elements = [0] * num_ranks, [0] * num_ranks, [0] * num_ranks
    for index in sorted(range(len(found)), key=lambda i: (i != first, i)):
        owners = deal_blocks([elements for elements, _ in found[index]], loads)
        for owner, (elements, nbytes) in zip(owners, found[index], strict=True):
            loads[owner] += elements
            weight_bytes[owner] += nbytes
            tied_elements[owner] += elements if index == first else 0
    return tuple(Owned(*each) for each in zip(loads, weight_bytes, tied_elements, strict=True))


def num_lanes(share: Share) -> int:
    """In how many lanes a gradient is summed: `gradient_lanes`, or one for each replica."""
    return share.config.parallel.gradient_lanes or share.mesh.dp.size


def adds_in_place(share: Share) -> bool:
    """Whether gradients add up where the backward leaves them: one lane and nobody to share with."""
    return in_place(share.mesh, num_lanes(share) * share.context_lanes)


def summed_elements(share: Share) -> int:
    """Elements of the sum of all lanes on this rank: of the rows that it steps, and of a tied head's again where it is
    the embedding."""
    here = owned(share)
    return here.elements + (here.tied_elements if share.mesh.pp.size == 1 else 0)


def gradient_sum_bytes(share: Share) -> int:
    """The sum of all lanes: 4 bytes x `summed_elements`; none where a lane's own buffers are the sum."""
    return 0 if adds_in_place(share) else FP32 * summed_elements(share)


def optimizer_bytes(share: Share) -> int:
    """fp32 master weights and two moments of the rows that this rank steps: 12 bytes x elements."""
    return 3 * FP32 * owned(share).elements


def exchange_bytes(share: Share) -> int:
    """A bucket of gradients on its way, an estimate: 4 bytes x twice the elements of the largest, what leaves and what
    comes of this rank's rows from all lanes of a round, for each context lane; none where nothing is exchanged."""
    if adds_in_place(share):
        return 0
    of_layers = sum(weight.num_elements for weight in layer_weights(share))
    largest = max(of_layers, *(weight.num_elements for weight in end_weights(share)), 0)
    return 2 * FP32 * share.context_lanes * largest
