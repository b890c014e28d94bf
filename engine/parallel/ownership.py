"""Which rank steps which rows (ZeRO-1, arXiv 1910.02054): weights in blocks of rows, dealt to the ranks that hold them.

    a bucket: the weights of one layer, or the head, or the embedding
    | qkv 0:64 | qkv 64:96 | o_proj | gate_up 0:64 | gate_up 64:128 | down_proj | norms |     blocks, of fixed rows
    |<------- rank 0 ------->|<----------- rank 1 ----------->|<------ rank 2 ------->|     contiguous shares

The blocks do not depend on the number of ranks, so neither does what is computed of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from engine.kernels.weight import PANEL, Weight
from engine.parallel.collectives import start_all_gather_pieces
from engine.parallel.mesh import Mesh

BLOCK_ELEMENTS = 1 << 21  # of a block: 2% of a step goes into the calls, and shares differ by about one block


class HeldRows(Protocol):
    """What a `Part` of the model says of its rows."""

    @property
    def weight(self) -> Weight: ...
    @property
    def row(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def owned(self) -> bool: ...


@dataclass(frozen=True)
class RowBlock:
    """Rows [row, row + rows) of a weight. `counted` is True on one of the ranks of a replica that hold them: a sum over
    all ranks takes it from there."""

    weight: Weight
    row: int
    rows: int
    counted: bool = True

    @property
    def size(self) -> int:
        """Elements."""
        return self.rows * (self.weight.shape[1] if len(self.weight.shape) == 2 else 1)


def row_blocks(parts: Iterable[HeldRows], elements: int | None = None) -> list[RowBlock]:
    """The blocks of all weights, weight after weight, rows ascending: whole panels of 16 rows, as many as `elements`
    (BLOCK_ELEMENTS) hold, and never rows that are counted here beside rows that are not. A vector is one block."""
    held: dict[int, list[RowBlock]] = {}
    for part in parts:
        blocks = held.setdefault(id(part.weight), [])
        last = blocks[-1] if blocks else RowBlock(part.weight, 0, 0, part.owned)
        assert last.row + last.rows == part.row, (
            f"rows {last.row + last.rows} to {part.row} of {part.weight} are nobody's"
        )
        if blocks and last.counted == part.owned:
            blocks[-1] = RowBlock(part.weight, last.row, last.rows + part.shape[0], part.owned)
        else:
            blocks.append(RowBlock(part.weight, part.row, part.shape[0], part.owned))
    elements = BLOCK_ELEMENTS if elements is None else elements
    return [piece for blocks in held.values() for block in blocks for piece in _pieces(block, elements)]


def _pieces(block: RowBlock, elements: int) -> Iterator[RowBlock]:
    if len(block.weight.shape) == 1:
        yield block
        return
    step = max(PANEL, elements // block.weight.shape[1] // PANEL * PANEL)
    for row in range(block.row, block.row + block.rows, step):
        yield RowBlock(block.weight, row, min(step, block.row + block.rows - row), block.counted)


def deal_blocks(sizes: Sequence[int], loads: Sequence[int]) -> list[int]:
    """The rank of each block of a bucket, ascending: contiguous shares that even out what ranks hold so far (`loads`)
    as well as whole blocks allow. Whole numbers only, so that every rank finds the same."""
    total = sum(sizes)
    goal = sum(loads) + total
    wants = [max(0, goal - len(loads) * load) for load in loads]  # in units of 1 / (number of ranks)
    owners, rank, wanted, before = [], 0, wants[0], 0
    for size in sizes:
        middle = 2 * before + size
        while wanted * 2 * total <= middle * sum(wants) and rank < len(loads) - 1:
            rank += 1
            wanted += wants[rank]
        owners.append(rank)
        before += size
    return owners


@dataclass(frozen=True)
class Bucket:
    """Blocks whose gradients are complete at the same time, the rank of each (ascending), and this rank's own as
    weights that share the storage."""

    blocks: list[RowBlock]
    owners: list[int]
    own: list[Weight]

    def sizes(self, num_ranks: int) -> list[int]:
        """Elements of each rank's share."""
        shares = [0] * num_ranks
        for block, owner in zip(self.blocks, self.owners, strict=True):
            shares[owner] += block.size
        return shares


class Shares:
    """Which rows this rank steps, of weights that the ranks of `mesh.data` hold alike.

    `gradients` are all buckets, in the order in which a backward is through with them, and `buckets` those of them that
    are stepped: not a head that shares the embedding's storage, whose gradient joins the embedding's. With `share_grad`
    the gradient of a block is that of its weight; without it, it is a sum of the block's own.
    """

    def __init__(
        self,
        blocks: Sequence[RowBlock],
        groups: Sequence[Sequence[Weight]],
        mesh: Mesh,
        share_grad: bool = True,
        tied: Sequence[Weight] = (),
    ) -> None:
        """`groups`: the weights of each bucket. `tied`: the embedding, the head, or both, of a model that ties them,
        each alone in its bucket. They are dealt before all others and alike, on one stage of a pipeline or on two;
        where both are here, `blocks` are of the embedding."""
        self.data = data = mesh.data
        self.world = mesh.world
        by_weight: dict[int, list[RowBlock]] = {}
        for block in blocks:
            by_weight.setdefault(id(block.weight), []).append(block)
        for head in tied[1:]:
            by_weight[id(head)] = [replace(block, weight=head) for block in by_weight[id(tied[0])]]
        members = [[block for weight in group for block in by_weight[id(weight)]] for group in groups]
        loads = [0] * data.size
        dealt: dict[int, Bucket] = {}
        for index in sorted(range(len(members)), key=lambda i: (groups[i][0] not in tied, i)):
            sizes = [block.size for block in members[index]]
            owners = deal_blocks(sizes, [0] * data.size if groups[index][0] in tied else loads)
            for owner, size in zip(owners, sizes, strict=True):
                loads[owner] += 0 if groups[index][0] in tied[1:] else size
            mine = [block for block, owner in zip(members[index], owners, strict=True) if owner == data.index]
            own = [block.weight.slice(block.row, block.rows, share_grad) for block in mine]
            dealt[index] = Bucket(members[index], owners, own)
        self.gradients = [dealt[index] for index in range(len(members))]
        self.buckets = [each for each, group in zip(self.gradients, groups, strict=True) if group[0] not in tied[1:]]
        self._counted = {
            id(weight): block.counted
            for bucket in self.buckets
            for weight, block in zip(bucket.own, self._own_blocks(bucket), strict=True)
        }

    @classmethod
    def single(cls, weights: Sequence[Weight]) -> Shares:
        """All rows of all weights, for one rank."""
        blocks = [RowBlock(weight, 0, weight.shape[0]) for weight in weights]
        return cls(blocks, [[weight] for weight in weights], Mesh.single())

    @property
    def own(self) -> list[Weight]:
        """The blocks that this rank steps, bucket by bucket."""
        return [weight for bucket in self.buckets for weight in bucket.own]

    def own_rows(self) -> list[tuple[RowBlock, Weight]]:
        """Each of `own`, with the rows of the model's weight that it is; rows of one weight ascend."""
        return [pair for bucket in self.buckets for pair in zip(self._own_blocks(bucket), bucket.own, strict=True)]

    def is_counted(self, weight: Weight) -> bool:
        """Whether a sum over all ranks takes this one of `own` from this rank."""
        return self._counted[id(weight)]

    def start_publishing(self, bucket: Bucket) -> Callable[[], None]:
        """Sends this rank's blocks of the compute weights to the others. What it returns waits for theirs and writes
        them in place, and raises ParallelError."""
        if self.data.size == 1:
            return lambda: None
        blocks = [_bytes(block.weight.slice(block.row, block.rows)) for block in bucket.blocks]
        sizes = [0] * self.data.size
        for block, owner in zip(blocks, bucket.owners, strict=True):
            sizes[owner] += block.numel()
        mine = [_bytes(weight) for weight in bucket.own]
        pending = start_all_gather_pieces(torch.cat(mine) if mine else blocks[0][:0], self.data, sizes)

        def finish() -> None:
            pieces = pending.wait().split([block.numel() for block in blocks])
            for block, piece, owner in zip(blocks, pieces, bucket.owners, strict=True):
                if owner != self.data.index:
                    block.copy_(piece)

        return finish

    def _own_blocks(self, bucket: Bucket) -> list[RowBlock]:
        pairs = zip(bucket.blocks, bucket.owners, strict=True)
        return [block for block, owner in pairs if owner == self.data.index]


def _bytes(weight: Weight) -> Tensor:
    return weight.data.view(-1).view(torch.uint8)
