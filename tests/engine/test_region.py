"""Arithmetic on regions, against tensors that are marked element by element."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.region import Region, first_fault, whole

SHAPE = (9, 7)


@st.composite
def regions(draw, axes=2):
    origin = tuple(draw(st.integers(0, size - 1)) for size in SHAPE[:axes])
    shape = tuple(draw(st.integers(1, size - first)) for first, size in zip(origin, SHAPE, strict=False))
    return Region(origin, shape)


def marked(region):
    marks = np.zeros(SHAPE[: len(region.shape)], dtype=int)
    marks[region.within(whole(marks.shape))] = 1
    return marks


@given(regions(), regions())
def test_overlap_is_what_both_hold(a, b):
    common = a.overlap(b)
    both = marked(a) * marked(b)
    assert np.array_equal(both, marked(common) if common else np.zeros(SHAPE, dtype=int))
    if common:
        assert common.num_elements == both.sum()
        inner = np.zeros(a.shape, dtype=int)
        inner[common.within(a)] = 1
        assert np.array_equal(inner, both[a.within(whole(SHAPE))])


@given(regions(), st.integers(1, 80))
def test_row_blocks_are_the_region_cut_at_whole_rows(region, elements):
    blocks = list(region.row_blocks(elements))
    assert np.array_equal(sum(marked(block) for block in blocks), marked(region))
    assert all(block.num_elements <= elements or block.shape[0] == 1 for block in blocks)
    assert [block.origin[0] for block in blocks] == sorted(block.origin[0] for block in blocks)


@settings(max_examples=300)
@given(st.integers(1, 2).flatmap(lambda axes: st.tuples(regions(axes), st.lists(regions(axes), max_size=5))))
def test_first_fault_finds_an_element_that_is_not_there_once(case):
    region, pieces = case
    counts = sum((marked(piece) for piece in pieces), np.zeros(SHAPE[: len(region.shape)], dtype=int))
    fault = first_fault(region, pieces)
    if fault is None:
        assert (counts[region.within(whole(counts.shape))] == 1).all()
    else:
        place, count = fault
        assert marked(region)[place] and counts[place] == count != 1


def test_a_partition_has_no_fault():
    pieces = [Region((0, 0), (4, 7)), Region((4, 0), (5, 3)), Region((4, 3), (5, 4))]
    assert first_fault(whole(SHAPE), pieces) is None
    assert first_fault(whole(SHAPE), pieces[:2]) == ((4, 3), 0)
    assert first_fault(whole(SHAPE), [*pieces, pieces[0]]) == ((0, 0), 2)
