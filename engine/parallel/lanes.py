"""Gradient lanes: a sum of floats depends on how it is grouped, so how it is grouped is a setting and not the number of
ranks.

    samples --deal--> lane 0 | lane 1 | lane 2 | lane 3      each lane sums its own micro-batches
    round 0:          rank 0   rank 1                        dp = 2: lanes are folded 0, 1, 2, 3 whatever dp is
    round 1:                            rank 0   rank 1
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def deal(costs: Sequence[int], num_lanes: int) -> list[list[int]]:
    """Items to lanes: the dearest first, each to the lane with the least so far, ties to the first. The busiest lane
    has at most 4/3 of the least there could be (Graham, "Bounds on multiprocessing timing anomalies", 1969).

    Lanes hold ascending indices; with fewer items than lanes the last lanes are empty. A function of the arguments
    alone.
    """
    lanes: list[list[int]] = [[] for _ in range(num_lanes)]
    heap = [(0, lane) for lane in range(num_lanes)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, lane = heapq.heappop(heap)
        lanes[lane].append(index)
        heapq.heappush(heap, (load + costs[index], lane))
    return [sorted(lane) for lane in lanes]


def sequence_cost(length: int, width: int) -> int:
    """What a sequence of `length` tokens costs a model of that width, in units of its own: a layer's matmuls take about
    24 width^2 operations a token, causal attention 2 width for each pair of tokens."""
    return length * (12 * width + length)


def rounds(num_lanes: int, num_replicas: int) -> list[range]:
    """The lanes that run at the same time, one on each replica from the first on, in the order of folding."""
    return [range(first, min(first + num_replicas, num_lanes)) for first in range(0, num_lanes, num_replicas)]
