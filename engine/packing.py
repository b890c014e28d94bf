"""Samples of any length into micro-batches of a bounded number of tokens, with little waste."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import InputError


@dataclass(frozen=True)
class Packing:
    """Which samples share a micro-batch.

    `bins[b]` holds sample indices, ascending; bins are ordered by their first index.
    """

    bins: list[list[int]]
    num_tokens: int
    capacity: int
    room: int  # what the bins could hold; a sample longer than the capacity fills its bin exactly

    @property
    def fill(self) -> float:
        """Tokens over room, in [0, 1]; 1 when there is nothing to pack."""
        return self.num_tokens / self.room if self.room else 1.0


def pack(lengths: Sequence[int], capacity: int) -> Packing:
    """First-fit-decreasing: longest sample first, each into the first bin with room for it.

    A sample longer than `capacity` gets a bin of its own; for the others, many samples need at most 11/9 of the fewest
    bins there could be. The result is a function of the arguments alone. Takes O(n log n): a tree over the bins holds
    the most room left below each node, so the first fit is one descent.

    Raises InputError for a length or capacity below 1.
    """
    if capacity < 1:
        raise InputError(f"the capacity of a micro-batch is {capacity} tokens; it must be at least 1")
    if lengths and min(lengths) < 1:
        raise InputError(f"sample {min(range(len(lengths)), key=lengths.__getitem__)} has no token to pack")
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_length.setdefault(length, []).append(index)
    descending = sorted(by_length, reverse=True)
    bins = [[index] for length in descending if length > capacity for index in by_length[length]]
    fitting = [length for length in descending if length <= capacity]
    bins += _first_fit([(length, by_length[length]) for length in fitting], capacity)
    for members in bins:
        members.sort()
    bins.sort()
    room = sum(max(capacity, lengths[members[0]]) for members in bins)
    return Packing(bins, sum(lengths), capacity, room)


def pack_at_least(lengths: Sequence[int], capacity: int, least: int) -> Packing:
    """`pack` with a capacity of at most `capacity` that makes `least` bins, or as many as there are samples.

    The capacity is made smaller only where it must be, first to an even share of the tokens. Raises InputError.
    """
    packing = pack(lengths, capacity)
    wanted = min(least, len(lengths))
    smaller = min(capacity, -(-packing.num_tokens // max(1, wanted)))
    while len(packing.bins) < wanted:  # at a capacity of 1 every sample has a bin of its own
        packing = pack(lengths, smaller)
        smaller = max(1, smaller * 7 // 8)
    return packing


def _first_fit(runs: list[tuple[int, list[int]]], capacity: int) -> list[list[int]]:
    """Bins for samples given as runs of equal length, longest run first; every length fits a bin."""
    tokens = sum(length * len(members) for length, members in runs)
    # Two neighbouring bins hold more than one capacity between them, so this many leaves are never all used up.
    leaves = 1 << (2 * tokens // capacity + 2).bit_length()
    room = [capacity] * (2 * leaves)  # node i has children 2i and 2i + 1; an unopened bin is one with all its room
    bins: list[list[int]] = []
    for length, members in runs:
        at = 0
        while at < len(members):
            node = 1
            while node < leaves:
                node *= 2
                if room[node] < length:
                    node += 1
            if node - leaves == len(bins):
                bins.append([])
            take = min(room[node] // length, len(members) - at)
            bins[node - leaves] += members[at : at + take]
            at += take
            left = room[node] - take * length
            room[node] = left
            while node > 1:  # a parent changes only where this child was its maximum
                left = max(left, room[node ^ 1])
                node //= 2
                if room[node] == left:
                    break
                room[node] = left
    return bins
