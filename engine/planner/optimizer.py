"""Who steps which rows (ZeRO-1, arXiv 1910.02054), by the functions that the engine deals them with.

As in `parallel/ownership.py`: weights are cut into blocks of rows, a bucket is the blocks of a layer, of the head or of
the embedding, and the blocks of each bucket are dealt to the dp x cp ranks that hold the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import cast

from engine.kernels.memory import num_bytes
from engine.kernels.weight import Weight, storage_shape
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


def blocks(share: Share, weights: list[Held]) -> Blocks:
    """The blocks of a bucket. Rows of key/value heads that are another rank's to count are never in one block with
    query rows."""
    cut = [piece for weight in weights for piece in row_blocks(_parts(share, weight))]
    sizes = []
    for block in cut:
        shape = (block.rows, *block.weight.shape[1:])
        sizes.append((block.size, num_bytes(storage_shape(shape, share.dtype, block.weight.packed), share.dtype)))
    return tuple(sizes)


def _parts(share: Share, held: Held) -> list[_Rows]:
    weight, rest = cast(Weight, held), held.shape[1:]  # its shape is all that blocks are made of
    if not held.name.startswith("qkv"):
        return [_Rows(weight, 0, held.shape, True)]
    queries = share.H * share.Dh
    return [
        _Rows(weight, 0, (queries, *rest), True),
        _Rows(weight, queries, (held.shape[0] - queries, *rest), share.heads.owned),
    ]


def buckets(share: Share) -> tuple[list[Blocks], int | None]:
    """All buckets in the order in which a backward is through with them, and which of them is a tied embedding or head
    that another stage has too: it is dealt first."""
    ends = {weight.name: weight for weight in end_weights(share)}
    layer = layer_weights(share)
    found = [blocks(share, [ends["head"]])] if "head" in ends else []
    has_head = len(found)
    found += [blocks(share, layer)] * share.num_layers
    if share.is_last:
        found[has_head] = blocks(share, [*layer, ends["last norm"]])
    if share.is_first:
        found.append(blocks(share, [ends["embedding"]]))
    tied = share.model.tie_word_embeddings and share.mesh.pp.size > 1
    first = len(found) - 1 if share.is_first else 0
    return found, first if tied and (share.is_first or share.is_last) else None


def owned_by_each(share: Share) -> tuple[Owned, ...]:
    """What each of the dp x cp ranks that hold these weights steps."""
    found, tied = buckets(share)
    return _deal(tuple(found), tied, share.mesh.data.size)


def owned(share: Share) -> Owned:
    """What this rank steps."""
    return owned_by_each(share)[share.mesh.data.index]


@lru_cache
def _deal(found: tuple[Blocks, ...], tied: int | None, num_ranks: int) -> tuple[Owned, ...]:
    loads, weight_bytes, tied_elements = [0] * num_ranks, [0] * num_ranks, [0] * num_ranks
    for index in sorted(range(len(found)), key=lambda i: (i != tied, i)):
        owners = deal_blocks([elements for elements, _ in found[index]], loads)
        for owner, (elements, nbytes) in zip(owners, found[index], strict=True):
            loads[owner] += elements
            weight_bytes[owner] += nbytes
            tied_elements[owner] += elements if index == tied else 0
    return tuple(Owned(*each) for each in zip(loads, weight_bytes, tied_elements, strict=True))


def num_lanes(share: Share) -> int:
    """In how many lanes a gradient is summed: `gradient_lanes`, or one for each replica."""
    return share.config.parallel.gradient_lanes or share.mesh.dp.size


def adds_in_place(share: Share) -> bool:
    """Whether gradients add up where the backward leaves them: one lane and nobody to share with."""
    return in_place(share.mesh, num_lanes(share))


def gradient_sum_bytes(share: Share) -> int:
    """The sum of all lanes, of the rows that this rank steps: 4 bytes x elements; none where a lane's own buffers are
    the sum."""
    return 0 if adds_in_place(share) else FP32 * owned(share).elements


def optimizer_bytes(share: Share) -> int:
    """fp32 master weights and two moments of the rows that this rank steps: 12 bytes x elements."""
    return 3 * FP32 * owned(share).elements


def exchange_bytes(share: Share) -> int:
    """A bucket of gradients on its way, an estimate: 4 bytes x twice the elements of the largest, what leaves and what
    comes of this rank's rows from all lanes of a round; none where nothing is exchanged."""
    if adds_in_place(share):
        return 0
    found, _ = buckets(share)
    return 2 * FP32 * max(sum(elements for elements, _ in bucket) for bucket in found)
