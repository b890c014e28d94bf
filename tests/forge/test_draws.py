"""Draws are a function of their key."""

from collections import Counter

import pytest

from forge.draws import Draws


def test_same_key_gives_same_draws_and_another_key_others():
    one, again, other = Draws(0, 7, "edge"), Draws(0, 7, "edge"), Draws(0, 8, "edge")
    words = [one.word() for _ in range(20)]
    assert words == [again.word() for _ in range(20)]
    assert not set(words) & {other.word() for _ in range(20)}


def test_draws_do_not_change_between_versions():
    draws = Draws(1, 2, "three")
    assert [draws.integer(0, 99) for _ in range(6)] == [61, 95, 3, 20, 61, 55]


def test_integers_fill_their_range_evenly():
    draws = Draws("integers")
    counts = Counter(draws.integer(-2, 3) for _ in range(6000))
    assert sorted(counts) == [-2, -1, 0, 1, 2, 3]
    assert all(850 < count < 1150 for count in counts.values())  # 1000 expected, standard deviation 29


def test_weighted_choice_follows_weights_and_never_takes_weight_zero():
    draws = Draws("weights")
    counts = Counter(draws.weighted("abc", [3.0, 0.0, 1.0]) for _ in range(4000))
    assert set(counts) == {"a", "c"}
    assert 2850 < counts["a"] < 3150  # 3000 expected, standard deviation 27
    with pytest.raises(ValueError, match="one must be above 0"):
        draws.weighted("ab", [0, 0])


def test_shuffled_keeps_every_item_and_uniform_stays_in_range():
    draws = Draws("shuffle")
    orders = {tuple(draws.shuffled("abc")) for _ in range(200)}
    assert len(orders) == 6
    assert all(0.0 <= draws.uniform() < 1.0 for _ in range(1000))


def test_empty_choices_are_refused():
    with pytest.raises(ValueError, match="no items"):
        Draws(0).choice([])
    with pytest.raises(ValueError, match=r"\[3, 2\]"):
        Draws(0).integer(3, 2)
