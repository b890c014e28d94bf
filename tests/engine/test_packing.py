"""Packing: nothing lost, nothing over the capacity, and first-fit-decreasing as its plain definition says."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InputError
from engine.packing import pack, pack_at_least


def plain_first_fit_decreasing(lengths, capacity):
    bins = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for members in bins:
            if sum(lengths[i] for i in members) + lengths[index] <= capacity:
                members.append(index)
                break
        else:
            bins.append([index])
    return sorted(sorted(members) for members in bins)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 70), max_size=60), st.integers(1, 64))
def test_pack_equals_the_plain_definition(lengths, capacity):
    assert pack(lengths, capacity).bins == plain_first_fit_decreasing(lengths, capacity)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 300), max_size=200), st.integers(1, 128))
def test_every_sample_is_in_one_bin_within_capacity(lengths, capacity):
    packing = pack(lengths, capacity)
    assert sorted(index for members in packing.bins for index in members) == list(range(len(lengths)))
    for members in packing.bins:
        assert len(members) == 1 or sum(lengths[i] for i in members) <= capacity
    assert 0.0 < packing.fill <= 1.0


def test_samples_that_fit_one_bin_stay_in_the_order_given():
    assert pack([3, 9, 4, 1], 17).bins == [[0, 1, 2, 3]]


def test_a_sample_over_the_capacity_has_a_bin_of_its_own_and_counts_as_full():
    packing = pack([100, 4, 4], 8)
    assert packing.bins == [[0], [1, 2]]
    assert packing.fill == 1.0


def test_nothing_packs_into_nothing():
    assert pack([], 8).bins == []


@pytest.mark.parametrize(
    ("lengths", "capacity", "complaint"),
    [([3, 0], 8, "sample 1 has no token"), ([3], 0, "capacity of a micro-batch is 0 tokens")],
)
def test_no_tokens_or_no_capacity_is_refused(lengths, capacity, complaint):
    with pytest.raises(InputError, match=complaint):
        pack(lengths, capacity)


def test_packing_descends_a_tree_rather_than_walking_the_bins():
    """100 000 samples, every length different in turn: a walk over the bins would take minutes."""
    lengths = [1 + (7919 * i) % 8000 for i in range(100_000)]
    packing = pack(lengths, 8192)
    assert packing.fill > 0.98


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 1000), st.integers(1, 70))
def test_as_many_bins_as_asked_for_where_there_are_samples(lengths, capacity, least):
    packing = pack_at_least(lengths, capacity, least)
    assert len(packing.bins) >= min(least, len(lengths))
    assert packing.capacity <= capacity
    assert sorted(index for members in packing.bins for index in members) == list(range(len(lengths)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 1000))
def test_the_capacity_stays_where_there_are_bins_enough(lengths, capacity):
    packing = pack(lengths, capacity)
    assert pack_at_least(lengths, capacity, len(packing.bins)) == packing
