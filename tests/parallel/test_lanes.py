"""Who computes which samples: functions of the samples alone, evenly."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.parallel.lanes import deal, rounds, sequence_cost

costs = st.lists(st.integers(1, 10**9), max_size=60)


@settings(max_examples=60, deadline=None)
@given(costs, st.integers(1, 12))
def test_every_item_is_in_one_lane_in_order(costs: list[int], num_lanes: int) -> None:
    lanes = deal(costs, num_lanes)
    assert len(lanes) == num_lanes
    assert sorted(index for lane in lanes for index in lane) == list(range(len(costs)))
    assert all(lane == sorted(lane) for lane in lanes)


@settings(max_examples=60, deadline=None)
@given(costs, st.integers(1, 12))
def test_lanes_differ_by_one_item_at_most(costs: list[int], num_lanes: int) -> None:
    """An item goes to the lane with the least: the busiest had no more than the least has, before its last item."""
    loads = [[costs[index] for index in lane] for lane in deal(costs, num_lanes)]
    busiest = max(loads, key=sum)
    assert not busiest or sum(busiest) - min(busiest) <= min(map(sum, loads))


def test_one_lane_has_all_items() -> None:
    assert deal([3, 1, 2], 1) == [[0, 1, 2]]


def test_a_long_sequence_costs_more_than_its_tokens() -> None:
    """Where a sequence is 12 widths long, attention costs as much as the matmuls."""
    assert sequence_cost(1200, 100) == 2 * 1200 * 12 * 100
    assert sequence_cost(1, 100) * 1200 * 1.99 < sequence_cost(1200, 100)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 9))
def test_rounds_go_through_the_lanes_in_order(num_lanes: int, num_replicas: int) -> None:
    found = rounds(num_lanes, num_replicas)
    assert [lane for now in found for lane in now] == list(range(num_lanes))
    assert all(len(now) == num_replicas for now in found[:-1]) and len(found[-1]) <= num_replicas
