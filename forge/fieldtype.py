"""Whether what one node writes into a field is what another can read from it."""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec


def assignable(writer: Any, reader: Any) -> bool:
    """Whether every value of the type `writer` can be read as `reader`: the same type, an arm of a union, a literal of
    the type, an integer as a float, containers by their elements. A struct is read as the same struct only."""
    if reader is Any or writer == reader:
        return True
    if get_origin(writer) is Annotated:  # what a constraint narrows still has the type
        return assignable(get_args(writer)[0], reader)
    if get_origin(writer) in (Union, types.UnionType):
        return all(assignable(arm, reader) for arm in get_args(writer))
    if get_origin(reader) in (Union, types.UnionType):
        return any(assignable(writer, arm) for arm in get_args(reader))
    if get_origin(writer) is Literal:
        values = get_args(writer)
        if get_origin(reader) is Literal:
            return set(values) <= set(get_args(reader))
        return all(assignable(type(value), reader) for value in values)
    if writer is int and reader is float:
        return True
    if get_origin(reader) is None:
        return get_origin(writer) is reader  # list[int] read as a bare list
    return (
        get_origin(writer) is get_origin(reader)
        and len(get_args(writer)) == len(get_args(reader))
        and all(map(assignable, get_args(writer), get_args(reader)))
    )


def narrowest(kinds: Iterable[Any]) -> Any | None:
    """The one of the types that can be read as each of the others, or None when they disagree."""
    listed = list(kinds)
    return next((kind for kind in listed if all(assignable(kind, other) for other in listed)), None)


def has_type(value: Any, kind: Any) -> bool:
    """Whether the value is one of the type, without conversion."""
    try:
        return bool(msgspec.convert(value, kind) == value)
    except msgspec.ValidationError:
        return False


def type_name(kind: Any) -> str:
    """The type as one would write it: `int`, `list[str]`."""
    return kind.__name__ if isinstance(kind, type) and get_origin(kind) is None else str(kind).replace("typing.", "")
