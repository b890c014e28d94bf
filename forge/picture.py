"""A graph for a person to read: as text, or as a Mermaid flow chart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import msgspec

from forge.condition import has
from forge.fieldtype import type_name

if TYPE_CHECKING:
    from forge.graph import Graph
    from forge.node import Node


def text(graph: Graph) -> str:
    """One paragraph per node, in an order in which a walk could meet them."""
    nodes = [graph.nodes[name] for name in _walk_order(graph)]
    lines = [
        f"graph {graph.name}  version {graph.version}  {len(nodes)} nodes",
        *([f"  given  {_conditions(graph.given)}"] if graph.given else []),
        f"  goal   {_conditions(graph.goal)}",
        f"  start  -> {_heads(graph, 'start')}",
    ]
    for node in nodes:
        lines.append(f"\n{node.name}  version {node.version}{'  (a graph)' if node.graph else ''}")
        lines += [f"  {title:<9}{what}" for title, what in _rows(graph, node) if what]
    return "\n".join(lines)


def _rows(graph: Graph, node: Node) -> Iterator[tuple[str, str]]:
    yield "reads", ", ".join(f"{f}: {type_name(t)}" for f, t in node.reads.items())
    yield "writes", ", ".join(f"{f}: {type_name(t)}" for f, t in node.writes.items())
    # What follows from the fields read and written alone is not said twice.
    yield (
        "requires",
        ", ".join(str(c) for c in node.preconditions.values() if c != has(c.field) or c.field not in node.reads),
    )
    yield "ensures", ", ".join(str(c) for c in node.effects.values() if c != has(c.field))
    yield "with", ", ".join(f"{key}={value!r}" for key, value in msgspec.structs.asdict(node.parameters).items())
    yield "->", _heads(graph, node.name) + (" | goal" if node.name in graph.targets and graph.edges[node.name] else "")


def mermaid(graph: Graph) -> str:
    """A flow chart in Mermaid's language; an edge with a weight other than 1 is labelled with it."""
    lines = ["flowchart LR", "  start([start])", "  goal([goal])"]
    order = _walk_order(graph)
    lines += [f'  {_identifier(name)}["{name}"]' for name in order]
    for tail in ("start", *order):
        for head in graph.edges[tail]:
            weight = graph.weights.get(tail, {}).get(head, 1.0)
            label = "" if weight == 1.0 else f"|{weight:g}|"
            lines.append(f"  {_identifier(tail)} -->{label} {_identifier(head)}")
    lines += [f"  {_identifier(name)} --> goal" for name in graph.targets]
    return "\n".join(lines)


FORMS: dict[str, Callable[[Graph], str]] = {"text": text, "mermaid": mermaid}


def _heads(graph: Graph, tail: str) -> str:
    weights = graph.weights.get(tail, {})
    heads = [f"{head} ({weights[head]:g})" if head in weights else head for head in graph.edges[tail]]
    return " | ".join(heads) or "goal"


def _conditions(conditions: dict) -> str:
    return ", ".join(map(str, conditions.values()))


def _walk_order(graph: Graph) -> list[str]:
    """The nodes so that every edge points forward (reverse post-order of a depth-first search)."""
    order: list[str] = []

    def visit(name: str) -> None:
        for head in reversed(graph.edges[name]):
            if head not in order:
                visit(head)
        order.append(name)

    visit("start")
    return order[-2::-1]


def _identifier(name: str) -> str:
    """A name that Mermaid takes: `start`, `goal` and the language's own words (`end`) are not among them."""
    return name if name == "start" else "node_" + "".join(c if c.isalnum() else "_" for c in name)
