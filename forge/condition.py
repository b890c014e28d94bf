"""Conditions over the fields of a record, as data.

A condition names one field and the set of its states that it allows: absent, or a value that is one of a list, or any
value but those of a list. Such sets are closed under `~`, `&` and `|`, so whether one condition implies another is
decided exactly, and a graph's edges follow from what its nodes declare.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from engine import ConfigError


class Condition(msgspec.Struct, frozen=True):
    """The states of `field` that are allowed. Build one with `has`, `missing`, `equals`, `differs` or `one_of`.

    `listed` says how to read `values`: the only values allowed, or the only ones refused. `absent` says whether the
    record may lack the field. Two conditions are equal exactly when they allow the same states.
    """

    field: str
    values: frozenset[Any] = frozenset()
    listed: bool = False
    absent: bool = False

    def __invert__(self) -> Condition:
        return Condition(self.field, self.values, not self.listed, not self.absent)

    def __and__(self, other: Condition) -> Condition:
        """The states that both allow. Raises ConfigError for conditions over two fields."""
        if self.field != other.field:
            raise ConfigError(f"{self} and {other} are over two fields; list them as two conditions")
        absent = self.absent and other.absent
        if self.listed and other.listed:
            return Condition(self.field, self.values & other.values, True, absent)
        if self.listed:
            return Condition(self.field, self.values - other.values, True, absent)
        if other.listed:
            return Condition(self.field, other.values - self.values, True, absent)
        return Condition(self.field, self.values | other.values, False, absent)

    def __or__(self, other: Condition) -> Condition:
        """The states that either allows. Raises ConfigError for conditions over two fields."""
        return ~(~self & ~other)

    @property
    def impossible(self) -> bool:
        """Whether no state at all is allowed."""
        return self.listed and not self.values and not self.absent

    def implies(self, other: Condition) -> bool:
        """Whether every state this allows is one that `other` allows."""
        return (self & ~other).impossible

    def holds(self, record: Mapping[str, Any]) -> bool:
        """Whether the record is in a state this allows."""
        if self.field not in record:
            return self.absent
        value = record[self.field]
        return any(value == each for each in self.values) == self.listed

    def __str__(self) -> str:
        """The call that makes this condition, as one would write it."""
        field, values = repr(self.field).replace("'", '"'), ", ".join(map(repr, sorted(self.values, key=repr)))
        if self.impossible:
            return f"impossible({field})"
        if not self.values:
            if self.listed:
                return f"missing({field})"
            return f"anything({field})" if self.absent else f"has({field})"
        if self.absent:
            return f"~{~self}"
        if not self.listed:
            return f"differs({field}, {values})"
        return f"{'equals' if len(self.values) == 1 else 'one_of'}({field}, {values})"


def has(field: str) -> Condition:
    """The record has the field, whatever its value."""
    return Condition(field)


def missing(field: str) -> Condition:
    """The record does not have the field; as a postcondition, the node deletes it."""
    return ~has(field)


def equals(field: str, value: Any) -> Condition:
    """The record has the field and it is `value` (hashable)."""
    return one_of(field, value)


def one_of(field: str, *values: Any) -> Condition:
    """The record has the field and it is one of `values` (hashable). Raises ConfigError when there are none."""
    if not values:
        raise ConfigError(f'one_of("{field}") lists no value; name at least one')
    return Condition(field, _value_set(field, values), True)


def differs(field: str, *values: Any) -> Condition:
    """The record has the field and it is none of `values` (hashable)."""
    return Condition(field, _value_set(field, values))


def _value_set(field: str, values: tuple[Any, ...]) -> frozenset[Any]:
    try:
        return frozenset(values)
    except TypeError:
        raise ConfigError(
            f'a condition on "{field}" compares with {values!r}; use numbers, strings or booleans'
        ) from None


def merge(conditions: Iterable[Condition]) -> dict[str, Condition]:
    """One condition per field: the conjunction of all that name it. Raises ConfigError when two exclude each other."""
    merged: dict[str, Condition] = {}
    for condition in conditions:
        if not isinstance(condition, Condition):
            raise ConfigError(
                f"{condition!r} is not a condition; write has(...), missing(...), equals(...) or one_of(...)"
            )
        before = merged.get(condition.field)
        merged[condition.field] = both = condition if before is None else before & condition
        if both.impossible:
            raise ConfigError(f"{before or condition} and {condition} exclude each other; drop one")
    return merged
