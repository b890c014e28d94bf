"""Nodes that the tests build graphs of, and a way to make more."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable
from typing import Any

import msgspec

from forge import Node, NodeKind, Reject, equals, has, missing, node
from forge.condition import merge
from forge.draws import Draws


def make(name: str, needs: str = "", writes: str = "", requires=(), ensures=(), kinds=None, run=None) -> Node:
    """A node that reads and writes strings: `make("b", "x y", "z")`. `kinds` overrides types by field."""
    kinds = kinds or {}

    def call(record, draws: Draws) -> dict[str, Any]:
        if run is not None:
            return run(record, draws)
        made = {field: f"{name}.{field}" for field in writes.split()}
        for condition in ensures:
            if condition.values and condition.listed:
                made[condition.field] = sorted(condition.values, key=repr)[0]
        return made

    return Node(
        name,
        1,
        {field: kinds.get(field, str) for field in needs.split()},
        {field: kinds.get(field, str) for field in writes.split()},
        merge([*map(has, needs.split()), *requires]),
        merge([*map(has, writes.split()), *ensures]),
        call=call,
    )


def branch(name: str, mode: str) -> Node:
    """A node after which `mode` is known."""
    return make(name, "seed", "mode", ensures=[equals("mode", mode)])


class Number(msgspec.Struct):
    number: int


class Half(msgspec.Struct):
    half: int


class Shift(msgspec.Struct, frozen=True):
    by: int = 0


@node(version=3)
def draw_number(draws: Draws) -> Number:
    return Number(draws.integer(0, 99))


@node(preconditions=[missing("half")])
async def halve(value: Number, parameters: Shift, draws: Draws) -> Half:
    """Rejects odd numbers; waits a while that differs from row to row, so that walks overtake each other."""
    await asyncio.sleep(draws.uniform() * 1e-3)
    number = value.number + parameters.by
    if number % 2:
        raise Reject(f"{number} is odd")
    if number == 50:
        raise OverflowError("fifty")
    return Half(number // 2)


def call(kind: NodeKind, record: dict[str, Any], draws: Draws | None = None, **parameters: Any) -> Any:
    """What a node of the kind writes for this record."""
    function = kind.bind("node", parameters).call
    assert function is not None, "a decorated function has one"
    result = function(record, draws or Draws(0))
    return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result
