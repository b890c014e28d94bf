"""What can be wrong with a graph, and its remedy. Every check yields one sentence per problem."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from forge.condition import Condition, missing
from forge.fieldtype import assignable, has_type, narrowest, type_name
from forge.node import Node, nearest

if TYPE_CHECKING:
    from forge.graph import Graph

START = "start"


def declarations(graph: Graph, listed: Sequence[Node]) -> Iterator[str]:
    """Names, the goal, and conditions that no node could ever satisfy."""
    names = [each.name for each in listed]
    for name in dict.fromkeys(n for n in names if names.count(n) > 1):
        yield f'{names.count(name)} nodes are called "{name}"; bind all but one to another name'
    if START in names:
        yield f'a node is called "{START}", which names the beginning of a walk; give it another name'
    if not graph.goal:
        yield "the goal is empty, so no walk has an end; name the fields a finished record has"
    elif all(graph.given.get(f, missing(f)).implies(c) for f, c in graph.goal.items()):
        yield "the goal already holds before the first node; name a field that a node writes"
    for condition in graph.goal.values():
        yield from _dangling(graph, "the goal", condition)
    for each in listed:
        for condition in each.preconditions.values():
            yield from _dangling(graph, f'node "{each.name}"', condition)


def _dangling(graph: Graph, who: str, condition: Condition) -> Iterator[str]:
    name = condition.field
    writers = {n.name: n.effects[name] for n in graph.nodes.values() if name in n.effects}
    before = graph.given.get(name, missing(name))
    if before.implies(condition) or any(effect.implies(condition) for effect in writers.values()):
        return
    if writers:
        offers = "; ".join(f'"{writer}" establishes {effect}' for writer, effect in writers.items())
        yield f"{who} requires {condition}, which no node establishes: {offers}; change this or a postcondition"
    else:
        known = {f for n in graph.nodes.values() for f in n.writes} | set(graph.given)
        yield f'{who} requires {condition}, but no node writes "{name}"{nearest(name, known)}; add a node that does'


def field_types(graph: Graph) -> Iterator[str]:
    """Every writer of a field against every reader, and the values in conditions against the field's type."""
    nodes = graph.nodes.values()
    for reader in nodes:
        for name, kind in reader.reads.items():
            for writer in nodes:
                if name in writer.writes and not assignable(writer.writes[name], kind):
                    yield (
                        f'node "{writer.name}" writes "{name}" as {type_name(writer.writes[name])}, but node '
                        f'"{reader.name}" reads it as {type_name(kind)}; declare one type in both'
                    )
    for name in graph.given:
        readers = {n.name: n.reads[name] for n in nodes if name in n.reads}
        if readers and narrowest(readers.values()) is None:
            kinds = ", ".join(f'"{reader}" as {type_name(kind)}' for reader, kind in readers.items())
            yield f'nodes disagree on the type of the given field "{name}": {kinds}; declare one type in all'
    for each in nodes:
        for condition in (*each.preconditions.values(), *each.effects.values()):
            written = [n.writes[condition.field] for n in nodes if condition.field in n.writes]
            for value in sorted(condition.values, key=repr):
                if written and not any(has_type(value, kind) for kind in written):
                    yield (
                        f'node "{each.name}" has the condition {condition}, but "{condition.field}" is written as '
                        f"{type_name(written[0])}, which {value!r} is not; correct the value"
                    )


def unreachable(graph: Graph) -> Iterator[str]:
    """Nodes that no walk comes to."""
    reached = {state.name for state in graph.states}
    for each in graph.nodes.values():
        if each.name in reached:
            continue
        closest = min((s for s in graph.states if not s.final), key=lambda state: len(state.lacks(each)))
        needs = " and ".join(map(str, closest.lacks(each)))
        if needs:
            yield (
                f'node "{each.name}" cannot be reached: the closest walk, {closest.path()}, does not establish '
                f"{needs}; add a node there that does, or drop the condition"
            )
        else:
            yield (
                f'node "{each.name}" cannot be reached: its preconditions hold after {closest.path()}, but '
                f'"{closest.name}" writes none of the fields they name; require one that it writes'
            )


def cycles(graph: Graph) -> Iterator[str]:
    """One cycle of the edges, if there is one (depth-first search)."""
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str] | None:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return None
        found = next((cycle for head in graph.edges[name] if (cycle := visit(head, [*trail, name]))), None)
        done.add(name)
        return found

    cycle = visit(START, [])
    if cycle:
        marks = [(n, f) for n in cycle for f in graph.nodes[n].writes if f not in graph.nodes[n].preconditions]
        if marks:
            remedy = f'for example missing("{marks[0][1]}") on node "{marks[0][0]}"'
        else:
            remedy = f'for example on a new field that node "{cycle[0]}" writes and requires to be missing'
        yield f"the edges {' -> '.join(cycle)} form a cycle; let a precondition exclude the second visit, {remedy}"


def dead_ends(graph: Graph) -> Iterator[str]:
    """Walks that stop short of the goal, one for each node where they stop."""
    goal = Node("goal", 0, {}, {}, graph.goal, {})
    reported: set[str] = set()
    for state in graph.states:
        if state.final or state.successors or state.name in reported:
            continue
        reported.add(state.name)
        where = f"no node can follow the walk {state.path()} and the goal does not hold"
        walked = {at.name for at in state.trail()}
        rest = [each for each in graph.nodes.values() if each.name not in walked]
        ready = next((each for each in rest if not state.lacks(each)), None)
        if ready is not None:
            yield (
                f'{where}; the preconditions of node "{ready.name}" hold, but "{state.name}" writes none of the '
                "fields they name: require one that it writes"
            )
            continue
        closest = min((goal, *rest), key=lambda each: len(state.lacks(each)))
        needs = " and ".join(map(str, state.lacks(closest)))
        who = "the goal" if closest is goal else f'node "{closest.name}"'
        yield f'{where}; {who} is closest and lacks {needs}: let a node after "{state.name}" establish it'


def weights(graph: Graph) -> Iterator[str]:
    """Weights of edges that do not exist, that are no weights, or that leave a walk nowhere to go."""
    for tail, heads in graph.weights.items():
        if tail not in graph.edges:
            yield f'weights are given for node "{tail}"{nearest(tail, graph.edges)}, which the graph does not have'
            continue
        edges = graph.edges[tail]
        for head, weight in heads.items():
            if head not in edges:
                yield (
                    f"a weight is given for {tail} -> {head}{nearest(head, edges)}, which is no edge; from "
                    f'"{tail}" there are {", ".join(edges) or "none"}'
                )
            if not 0.0 <= weight < float("inf"):
                yield f"the weight of {tail} -> {head} is {weight}; it must be 0 or more, and finite"
    for state in graph.states:
        if state.successors and not any(weight > 0 for weight in state.weights):
            yield f"every edge that can follow {state.path()} has weight 0; give one of them more"
