"""The algebra of conditions, against the states it stands for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import ConfigError
from forge.condition import Condition, differs, equals, has, merge, missing, one_of

RECORDS = [{}, {"x": "a"}, {"x": "b"}, {"x": "c"}, {"x": "never named"}]
conditions = st.builds(Condition, st.just("x"), st.frozensets(st.sampled_from("abc")), st.booleans(), st.booleans())


def states(condition):
    return [condition.holds(record) for record in RECORDS]


@given(conditions, conditions)
def test_operators_are_those_of_sets_of_states(one, other):
    assert states(~one) == [not held for held in states(one)]
    assert states(one & other) == [a and b for a, b in zip(states(one), states(other), strict=True)]
    assert states(one | other) == [a or b for a, b in zip(states(one), states(other), strict=True)]


@given(conditions, conditions)
def test_implication_is_inclusion_of_states(one, other):
    assert one.implies(other) == all(b or not a for a, b in zip(states(one), states(other), strict=True))
    assert (one == other) == (states(one) == states(other))


@pytest.mark.parametrize(
    ("condition", "written"),
    [
        (has("x"), 'has("x")'),
        (~has("x"), 'missing("x")'),
        (equals("x", "a"), "equals(\"x\", 'a')"),
        (~equals("x", 1), '~equals("x", 1)'),
        (one_of("x", 2, 1), 'one_of("x", 1, 2)'),
        (differs("x", True), 'differs("x", True)'),
        (missing("x") | has("x"), 'anything("x")'),
        (missing("x") & has("x"), 'impossible("x")'),
    ],
)
def test_condition_prints_as_it_is_written(condition, written):
    assert str(condition) == written


def test_merge_refuses_conditions_that_exclude_each_other():
    assert merge([has("x"), one_of("x", 1, 2), differs("x", 2)]) == {"x": equals("x", 1)}
    with pytest.raises(ConfigError, match=r'equals\("x", 1\) and missing\("x"\) exclude each other'):
        merge([equals("x", 1), missing("x")])


def test_values_must_be_plain():
    with pytest.raises(ConfigError, match="numbers, strings or booleans"):
        equals("x", [1])
    with pytest.raises(ConfigError, match="at least one"):
        one_of("x")
