"""Collectives over a named group of ranks. Each is one all-to-all and a fold in rank order, so that a sum depends on
the ranks' order alone and never on the network's algorithm. A tensor goes as it lies: gloo carries CPU memory and what
is no tensor, NCCL a GPU's memory (unproven: no GPUs have talked yet).

A group of one makes each of them the identity, so callers need no branch on the number of ranks.

# p ranks of the group, T rows
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import ParallelError
from engine.parallel.failure import watchdog

T = TypeVar("T")
ONE_SHOT_BYTES = 1 << 16  # up to here every rank gets every partial sum: one latency instead of two


@dataclass(frozen=True)
class Group:
    """Ranks that communicate: their numbers in the world, in order, and this rank's place among them."""

    name: str
    ranks: tuple[int, ...] = (0,)
    index: int = 0
    handle: Any = None  # torch.distributed's; None for a group of one

    @property
    def size(self) -> int:
        return len(self.ranks)

    def __str__(self) -> str:
        return f"{self.name} (ranks {', '.join(map(str, self.ranks))})"


class Pending(Generic[T]):
    """A collective under way. `wait` returns its result; what it sends must not change before."""

    def __init__(self, what: str, group: Group, work: Any, finish: Callable[[], T], keep: Tensor | None = None) -> None:
        self._what, self._group, self._work, self._finish, self._keep = what, group, work, finish, keep

    @property
    def ready(self) -> bool:
        """Whether what a single exchange brings is here, so that `wait` need not wait."""
        return self._work is None or self._work.is_completed()

    def wait(self) -> T:
        """Raises ParallelError when a rank is gone or late."""
        with named(self._what, self._group):
            if self._work is not None:
                self._work.wait()
        return self._finish()


@contextmanager
def named(what: str, group: Group) -> Iterator[None]:
    """Around what may wait for other ranks: RuntimeErrors become a ParallelError that names the rank to blame."""
    dog = watchdog()
    if dog is not None:
        if dog.culprit is not None:
            raise dog.refuse(what, group)
        outer, dog.call = dog.call, (what, group, time.monotonic())
    try:
        yield
    except RuntimeError as error:
        if dog is not None:
            raise dog.explain(what, group, error) from None  # gloo's own words are in it where they tell something
        raise ParallelError(
            f"{what} over the group {group} failed on rank {group.ranks[group.index]}: {str(error).splitlines()[0]}; "
            "another rank has died or is not making the same calls"
        ) from error
    finally:
        if dog is not None:
            dog.call = outer


def start_all_to_all(
    x: Tensor,
    group: Group,
    send: list[int] | None = None,
    receive: list[int] | None = None,
    what: str = "all_to_all",
) -> Pending[Tensor]:
    """Row blocks of x to every rank in order, and theirs from every rank in order: [sum(send), ...] ->
    [sum(receive), ...]. `send` and `receive` are rows per rank; without them all blocks are alike. An error calls it
    `what`."""
    x = x.contiguous()
    if group.size == 1:
        return Pending(what, group, None, lambda: x)
    rows = x.shape[0] if receive is None else sum(receive)
    out = torch.empty((rows, *x.shape[1:]), dtype=x.dtype, device=x.device)
    width = x[:1].numel() if x.shape[0] else out[:1].numel()
    sizes = [None if rows_of is None else [n * width for n in rows_of] for rows_of in (receive, send)]
    with named("all_to_all", group):
        work = dist.all_to_all_single(out.view(-1), x.view(-1), sizes[0], sizes[1], group=group.handle, async_op=True)
    return Pending("all_to_all", group, work, lambda: out, keep=x)


def all_to_all(x: Tensor, group: Group, send: list[int] | None = None, receive: list[int] | None = None) -> Tensor:
    """`start_all_to_all` and its wait. Raises ParallelError."""
    return start_all_to_all(x, group, send, receive).wait()


def start_all_gather(x: Tensor, group: Group, what: str = "all_gather") -> Pending[Tensor]:
    """x of every rank, in order: [...] -> [p, ...]; all have one shape. An error calls it `what`."""
    if group.size == 1:
        return Pending(what, group, None, lambda: x.unsqueeze(0))
    copies = x.detach().unsqueeze(0).expand(group.size, *x.shape).contiguous()
    out = torch.empty_like(copies)
    with named(what, group):
        work = dist.all_to_all_single(out.view(-1), copies.view(-1), group=group.handle, async_op=True)
    return Pending(what, group, work, lambda: out, keep=copies)


def all_gather(x: Tensor, group: Group) -> Tensor:
    """`start_all_gather` and its wait. Raises ParallelError."""
    return start_all_gather(x, group).wait()


def start_all_gather_pieces(x: Tensor, group: Group, sizes: Sequence[int]) -> Pending[Tensor]:
    """Vectors of different lengths, `sizes[i]` of rank i, end to end in rank order: [sizes of this rank] -> [sum]."""
    return start_all_to_all(x.repeat(group.size), group, [x.shape[0]] * group.size, list(sizes))


def all_gather_rows(x: Tensor, group: Group) -> list[Tensor]:
    """The rows of every rank, in order, where their numbers may differ: [n, ...] -> p of [n_i, ...]. Raises
    ParallelError."""
    if group.size == 1:
        return [x]
    counts = all_gather(torch.tensor(x.shape[0]), group).tolist()
    rows = all_to_all(torch.cat([x] * group.size), group, [x.shape[0]] * group.size, counts)
    return list(rows.split(counts))


def fold(parts: Tensor) -> Tensor:
    """The sum over the first dimension, from 0 up, in float32 or wider: [p, ...] -> [...] in that type."""
    total = parts[0].to(_wide(parts.dtype), copy=True)
    for part in parts[1:]:
        total += part
    return total


def start_reduce_scatter(x: Tensor, group: Group, what: str = "reduce_scatter") -> Pending[Tensor]:
    """Block i of the sum over ranks, folded in rank order, to rank i: [p r, ...] -> [r, ...], in float32 or wider."""
    if group.size == 1:
        return Pending(what, group, None, lambda: x)
    pending = start_all_to_all(x.detach(), group, what=what)
    return Pending(what, group, None, lambda: fold(pending.wait().view(group.size, -1, *x.shape[1:])))


def start_all_reduce(x: Tensor, group: Group) -> Pending[Tensor]:
    """The sum over ranks, folded in rank order, on every rank, in float32 or wider. Small tensors go to every rank at
    once, big ones by a reduce-scatter and an all-gather: the bits are the same."""
    if group.size == 1:
        return Pending("all_reduce", group, None, lambda: x)
    x = x.detach()
    if x.numel() * x.element_size() <= ONE_SHOT_BYTES:
        everyone = start_all_gather(x, group, "all_reduce")
        return Pending("all_reduce", group, None, lambda: fold(everyone.wait()))
    flat = x.reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % group.size))
    mine = start_reduce_scatter(padded, group, "all_reduce")

    def finish() -> Tensor:
        return start_all_gather(mine.wait(), group, "all_reduce").wait().view(-1)[: flat.numel()].view(x.shape)

    return Pending("all_reduce", group, None, finish)


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """`start_all_reduce` and its wait. Raises ParallelError."""
    return start_all_reduce(x, group).wait()


def broadcast(x: Tensor, group: Group, source: int) -> Tensor:
    """x of the rank at place `source`, on every rank, in place. Raises ParallelError."""
    if group.size > 1:
        with named("broadcast", group):
            dist.broadcast(x, group.ranks[source], group=group.handle)
    return x


def start_send(x: Tensor, group: Group, to: int) -> Pending[None]:
    """Sends x to the rank at place `to`. x must live and stay as it is until `wait`. Tensors arrive in the order in
    which they were sent."""
    x = x.detach().contiguous()
    with named("send", group):
        work = dist.isend(x, group.ranks[to], group=group.handle)
    return Pending("send", group, work, lambda: None, keep=x)


def start_receive(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    group: Group,
    source: int,
    device: torch.device | str = "cpu",
) -> Pending[Tensor]:
    """The tensor that the rank at place `source` sends next, from its memory of the same kind."""
    out = torch.empty(shape, dtype=dtype, device=device)
    with named("receive", group):
        work = dist.irecv(out, group.ranks[source], group=group.handle)
    return Pending("receive", group, work, lambda: out)


def all_gather_object(value: T, group: Group) -> list[T]:
    """`value` of every rank, in order (pickled: for small things that are no tensors). Raises ParallelError."""
    if group.size == 1:
        return [value]
    values: list[Any] = [None] * group.size
    with named("all_gather_object", group):
        dist.all_gather_object(values, value, group=group.handle)
    return values


def broadcast_object(value: T, group: Group, source: int) -> T:
    """`value` of the rank at place `source`, on every rank. Raises ParallelError."""
    if group.size == 1:
        return value
    box = [value]
    with named("broadcast_object", group):
        dist.broadcast_object_list(box, group.ranks[source], group=group.handle)
    return box[0]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 or not dtype.is_floating_point else torch.float32
