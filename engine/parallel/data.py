"""Data parallelism: gradients of the lanes, summed on the rank that steps them, while the backward goes on.

    backward    head  layer 3  layer 2  layer 1  layer 0  embedding
    network           [head ]  [lay. 3] [lay. 2]  ...                 all-to-all: each rank gets its rows of all lanes,
    fold                       [head ]  [lay. 3]  ...                 and adds them to its sum in the order of the lanes

One replica with one lane has nothing to send, and its weights' gradients are the sum.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.kernels.linear import weight_gradients_wait
from engine.kernels.weight import Weight
from engine.parallel.collectives import Pending, fold, start_all_to_all
from engine.parallel.links import TIED
from engine.parallel.mesh import Mesh
from engine.parallel.ownership import Bucket, RowBlock, Shares
from engine.parallel.tensor import sum_shared_rows


class SharedRows(Protocol):
    """What a `PartialGradient` of the model says: rows of a weight that some tensor-parallel ranks hold alike."""

    @property
    def weight(self) -> Weight: ...
    @property
    def row(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def holders(self) -> range: ...


class GradientReducer:
    """Makes of the gradients of one `forward_backward` a sum that each rank holds for the rows it steps.

        begin()
        for each round of lanes:
            begin_lane(number of micro-batches here, which replicas have a lane)
            ... backwards: `backward_passed` for each of them, or `bucket_done` ...
            finish_lane()
        finish()

    In between, every weight's gradient is this lane's alone. Buckets are sent in one order on every rank, whatever the
    order in which they are done, and nothing waits for the network before `finish_lane`: a rank that waited in the
    middle of a backward could wait for one that waits for it. After `finish`, ranks that hold the same rows hold the
    same bits of their gradient: tensor-parallel copies, and the two copies of a tied embedding in a pipeline. A head
    that shares the embedding's storage is a bucket of its own until then; after it the embedding's gradient is the sum.

    Raises ParallelError.
    """

    def __init__(
        self,
        shares: Shares,
        mesh: Mesh,
        num_lanes: int,
        partial: Sequence[SharedRows],
        tied: Sequence[Weight],
        context_lanes: int = 1,
    ) -> None:
        """`partial`: see `Transformer.partial_gradients`; `tied`: `Transformer.tied_weights`. Each of the `num_lanes`
        is made of `context_lanes` on every rank of `mesh.cp`, whose gradients are those of `Weight.lane`."""
        self.shares = shares
        self.mesh = mesh
        self.in_place = in_place(mesh, num_lanes * context_lanes)
        self._here = range(context_lanes)
        self.partial = list(partial)
        self.buckets = shares.gradients
        self._tied = [self._own(weight) for weight in tied]
        bucket_of = {id(b.weight): i for i, bucket in enumerate(self.buckets) for b in bucket.blocks}
        self._partial_of: list[list[SharedRows]] = [[] for _ in self.buckets]
        for shared in self.partial:
            self._partial_of[bucket_of[id(shared.weight)]].append(shared)
        self._under_way: deque[tuple[Bucket, Pending[Tensor]]] = deque()
        self._live: list[int] = []  # places in mesh.data that have a lane in this round
        self._left: list[int] = []  # backwards of each bucket still to come
        self._done: set[int] = set()
        self._num_sent = 0

    def begin(self) -> None:
        """A `forward_backward` begins."""
        self._zero_copies()

    def begin_lane(self, num_micro_batches: int, live: Sequence[bool]) -> None:
        """A round of lanes begins: this rank's has `num_micro_batches` (0: it has no lane); `live[i]` says whether
        replica i has one."""
        each = self.mesh.data.size // self.mesh.dp.size
        self._live = [place for place in range(self.mesh.data.size) if live[place // each]]
        self._left = [num_micro_batches] * len(self.buckets)
        self._done, self._num_sent = set(), 0

    def backward_passed(self, bucket: int) -> None:
        """A micro-batch's backward has added all it has for this bucket; after the lane's last one the bucket is done.
        Where weight gradients wait for later, only `bucket_done` or `finish_lane` can tell. Outside of a lane nobody
        counts."""
        if self._left and not weight_gradients_wait():
            self._left[bucket] -= 1
            if self._left[bucket] == 0:
                self.bucket_done(bucket)

    def bucket_done(self, bucket: int) -> None:
        """This lane's gradient of the bucket is complete: it goes out as soon as those before it have."""
        if self.in_place:
            return
        self._done.add(bucket)
        while self._num_sent in self._done:
            self._send(self._num_sent)
        while self._under_way and self._under_way[0][1].ready:
            self._fold()

    def finish_lane(self) -> None:
        """Sends what has not been sent, and waits until this round is in the sum."""
        if self.in_place:
            return
        while self._num_sent < len(self.buckets):
            self._send(self._num_sent)
        while self._under_way:
            self._fold()
        self._left = []

    def finish(self) -> None:
        """All lanes are in the sum."""
        if self.in_place:
            sum_shared_rows([(_rows(shared), shared.holders) for shared in self.partial], self.mesh.tp)
        self._sum_tied()

    def reset(self) -> None:
        """Drops all gradients and what is under way."""
        self._under_way.clear()
        self._left = []
        whole = {id(block.weight): block.weight for bucket in self.buckets for block in bucket.blocks}
        own = () if self.in_place else (weight for bucket in self.buckets for weight in bucket.own)
        for weight in (*whole.values(), *own):
            weight.zero_grad()

    def _send(self, index: int) -> None:
        bucket, data = self.buckets[index], self.mesh.data
        self._num_sent += 1
        sizes = bucket.sizes(data.size)
        alive = data.index in self._live
        if alive:
            partial = [
                (_rows(shared, lane), shared.holders) for shared in self._partial_of[index] for lane in self._here
            ]
            sum_shared_rows(partial, self.mesh.tp)
            # What goes to a rank is together: its blocks of lane 0, then those of lane 1, ...
            by_rank = groupby(zip(bucket.owners, bucket.blocks, strict=True), key=itemgetter(0))
            blocks = [[block for _, block in group] for _, group in by_rank]
            pieces = [_rows(block, lane) for group in blocks for lane in self._here for block in group]
            flat = torch.cat([piece.reshape(-1) for piece in pieces])
            for piece in pieces:
                piece.zero_()
        else:
            flat = bucket.blocks[0].weight.grad_buffer().view(-1)[:0]
        sizes = [size * len(self._here) for size in sizes]
        receive = [sizes[data.index] if place in self._live else 0 for place in range(data.size)]
        pending = start_all_to_all(flat, data, sizes if alive else [0] * data.size, receive)
        self._under_way.append((bucket, pending))

    def _fold(self) -> None:
        """Adds the oldest exchange's lanes to the sum, in their order."""
        bucket, pending = self._under_way.popleft()
        sizes = [weight.grad_buffer().numel() for weight in bucket.own]
        for lane in pending.wait().view(len(self._live) * len(self._here), sum(sizes)):
            for weight, piece in zip(bucket.own, lane.split(sizes), strict=True):
                weight.grad_buffer().view(-1).add_(piece)

    def _zero_copies(self) -> None:
        """Of a sum that several ranks hold, one keeps what earlier calls left: it must not count twice."""
        for shared in self.partial if self.in_place else ():
            if shared.holders.start != self.mesh.tp.index:
                _rows(shared).zero_()
        if len(self._tied) == 1 and self.mesh.pp.index == self.mesh.pp.size - 1:
            for weight in self._tied[0]:
                weight.zero_grad()

    def _sum_tied(self) -> None:
        """The embedding's gradient plus the head's: on one stage in the embedding's place, else on the first stage and
        the last."""
        if not any(self._tied):  # another stage, or rows that others step
            return
        if len(self._tied) == 2:
            for weight, head in zip(*self._tied, strict=True):
                weight.grad_buffer().add_(head.grad_buffer())
                head.zero_grad()
            return
        (tied,), pp = self._tied, self.mesh.pp
        last = pp.size - 1
        mine = torch.cat([weight.grad_buffer().reshape(-1) for weight in tied])
        other = last if pp.index == 0 else 0
        sending = self.mesh.links.send(mine, TIED, other)
        theirs = self.mesh.links.receive(tuple(mine.shape), mine.dtype, TIED, other, mine.device).wait()
        sending.wait()
        total = fold(torch.stack([mine, theirs] if pp.index == 0 else [theirs, mine]))
        pieces = total.split([weight.grad_buffer().numel() for weight in tied])
        for weight, piece in zip(tied, pieces, strict=True):
            weight.grad_buffer().copy_(piece.view(weight.shape))

    def _own(self, tied: Weight) -> list[Weight]:
        buckets = [b for b in self.buckets if any(block.weight is tied for block in b.blocks)]
        return [weight for bucket in buckets for weight in bucket.own]


def in_place(mesh: Mesh, num_lanes: int) -> bool:
    """Whether gradients add up where the backward leaves them: one lane, and nobody to share with."""
    return mesh.data.size == 1 and num_lanes == 1


def tell_backward(passed: Callable[[], None], *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors themselves; when a backward has their gradients, and so has done all that was made of them, it calls
    `passed`."""
    return _Tell.apply(passed, *tensors)


class _Tell(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, passed: Callable[[], None], *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.passed = passed
        ctx.set_materialize_grads(False)
        return tuple(None if tensor is None else tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ctx.passed()
        return (None, *gradients)


def _rows(shared: SharedRows | RowBlock, lane: int = 0) -> Tensor:
    return shared.weight.lane(lane).grad_buffer()[shared.row : shared.row + shared.rows]
