"""One random walk through a graph, which makes one datapoint.

Walk i is a function of (graph, seed, i): every draw has its own stream, named by seed, walk, step and attempt. So walks
can run in any order or at once, and a run that was cut short continues as if it had not been.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import msgspec

from forge.draws import Draws
from forge.graph import Graph, State
from forge.node import Node, Reject


class Call(msgspec.Struct, frozen=True):
    """One node that ran: its name (`graph/node` inside a nested graph), version, the hash of its parameters, and the
    fields it wrote."""

    node: str
    version: int
    parameters: str
    wrote: tuple[str, ...]


class Failure(msgspec.Struct, frozen=True):
    """Why a row was not accepted.

    `kind` is "rejected" (a node turned it down), "failed" (a node raised), "invalid" (a node broke the types or
    postconditions it declares) or "duplicate" (an earlier row has the same `unique` fields).
    """

    kind: str
    node: str
    reason: str


class Walk(msgspec.Struct):
    """A walk that has ended: the record as it then was, the calls in order, and the failure, if it failed."""

    index: int
    record: dict[str, Any]
    calls: list[Call]
    failure: Failure | None = None


class _Stopped(Exception):
    def __init__(self, failure: Failure) -> None:
        self.failure = failure


async def take_walk(graph: Graph, seed: int, index: int, retries: int = 0) -> Walk:
    """Walk `index` of the graph. Never raises for what a node does: that is the walk's `failure`.

    A node that raises anything but `Reject` is called up to `retries` times again, with fresh draws.
    """
    walk = Walk(index, {}, [])
    try:
        await _follow(graph, (seed, index), walk.record, walk.calls, "", retries)
    except _Stopped as stopped:
        walk.failure = stopped.failure
    return walk


async def _follow(
    graph: Graph, key: tuple[int | str, ...], record: dict[str, Any], calls: list[Call], prefix: str, retries: int
) -> None:
    state, step = graph.start, 0
    while not state.final:
        state = _next(state, key, step)
        node = state.node
        assert node is not None, "only the start of a walk has no node"
        if node.graph is not None:
            inner = {name: record[name] for name in node.graph.given if name in record}
            try:
                await _follow(node.graph, (*key, step), inner, calls, f"{prefix}{node.name}/", retries)
            except _Stopped:
                record.update(inner)  # the rejected row shows how far the nested walk came
                raise
            wrote = {name: inner[name] for name in node.writes if name in inner}
        else:
            wrote = await _call(node, key, step, record, prefix, retries)
        record.update(wrote)
        for name, effect in node.effects.items():
            if name not in wrote and name in record and not effect.holds(record):
                del record[name]
        if node.graph is None:
            calls.append(Call(prefix + node.name, node.version, node.parameters_hash, tuple(wrote)))
        step += 1


def _next(state: State, key: tuple[int | str, ...], step: int) -> State:
    if len(state.successors) == 1:
        return state.successors[0]
    return Draws(*key, step, "edge").weighted(state.successors, state.weights)


async def _call(
    node: Node, key: tuple[int | str, ...], step: int, record: Mapping[str, Any], prefix: str, retries: int
) -> dict[str, Any]:
    """The fields that the node writes. Raises _Stopped when it does not, or not what it promised."""
    assert node.call is not None, "a node without a nested graph has a function"
    name = prefix + node.name
    for attempt in range(retries + 1):
        try:
            result = node.call(record, Draws(*key, step, "node", attempt))
            wrote: dict[str, Any] = await result if inspect.isawaitable(result) else result
            broken = [str(c) for f, c in node.effects.items() if f in wrote and not c.holds(wrote)]
            if broken:
                raise msgspec.ValidationError(f"broke its postcondition {', '.join(broken)}")
            return wrote
        except Reject as reject:
            raise _Stopped(Failure("rejected", name, str(reject))) from None
        except Exception as error:  # whatever a node raises costs one row, not the run
            kind = "invalid" if isinstance(error, msgspec.ValidationError) else "failed"
            failure = Failure(kind, name, str(error) if kind == "invalid" else f"{type(error).__name__}: {error}")
    raise _Stopped(failure)
