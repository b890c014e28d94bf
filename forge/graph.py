"""A graph of nodes whose edges follow from conditions, checked when it is made.

A walk starts with the fields that `given` establishes, and ends as soon as `goal` holds. After node A, node B may
follow exactly where what is then known implies every precondition of B, and A wrote at least one field that B's
preconditions name. What is known is followed along each walk, so an edge may rest on what an earlier node established.
The nodes that may come first are the sources, those after which the goal holds the targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from hashlib import sha256
from operator import or_
from typing import Any

import msgspec

from engine import ConfigError
from forge import check
from forge.check import START
from forge.condition import Condition, merge, missing
from forge.fieldtype import narrowest, type_name
from forge.node import Node, NodeKind
from forge.picture import FORMS

MAX_STATES = 20_000  # distinguishable points of walks; checking them takes about a second


class GraphError(ConfigError):
    """A graph that cannot run; `problems` lists everything found, each with its remedy."""

    def __init__(self, name: str, problems: list[str]) -> None:
        self.problems = problems
        text = problems[0] if len(problems) == 1 else "".join(f"\n  - {problem}" for problem in problems)
        super().__init__(f'graph "{name}": {text}')


@dataclass(eq=False)
class State:
    """A point of a walk: the node just run (None at the start) and what is known of each field after it.

    Fields that `knowledge` does not name are absent. `final` is where the goal holds and the walk ends.
    """

    node: Node | None
    knowledge: dict[str, Condition]
    previous: State | None = None
    final: bool = False
    successors: list[State] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return START if self.node is None else self.node.name

    def trail(self) -> Iterator[State]:
        """This state and those before it on one walk that leads here, backwards."""
        at: State | None = self
        while at is not None:
            yield at
            at = at.previous

    def path(self) -> str:
        """One walk that leads here, as text."""
        return " -> ".join(at.name for at in reversed(list(self.trail())))

    def lacks(self, node: Node) -> list[Condition]:
        """The preconditions of the node that what is known here does not imply."""
        return [c for c in node.preconditions.values() if not self.knowledge.get(c.field, missing(c.field)).implies(c)]

    def leads_to(self, node: Node) -> bool:
        """Whether the node may come next: it has what it requires, and this node wrote some of it."""
        wrote = self.node is None or any(name in node.preconditions for name in self.node.effects)
        return wrote and not self.lacks(node)


class Graph:
    """Nodes, the conditions a walk starts from and ends at, and the edges between the nodes.

    `weights[a][b]` is the weight of the edge from node a (or "start") to node b, 1.0 where it is not given: a walk at
    `a` takes each of its edges with probability in proportion. A nested graph may stand among the nodes. Raises
    GraphError with everything that is wrong.
    """

    def __init__(
        self,
        name: str,
        nodes: Iterable[Node | NodeKind | Graph],
        *,
        goal: Iterable[Condition],
        given: Iterable[Condition] = (),
        weights: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        self.name = name
        bound = [each.bind() if isinstance(each, NodeKind) else each for each in nodes]
        listed = [each.as_node() if isinstance(each, Graph) else each for each in bound]
        self.nodes = {each.name: each for each in listed}
        self.given, self.goal = merge(given), merge(goal)
        self.weights = {tail: dict(heads) for tail, heads in (weights or {}).items()}
        self._refuse(check.declarations(self, listed))
        self._refuse(check.field_types(self))
        self.start = State(None, dict(self.given))
        self.states = self._explore()
        self.edges = self._edges()
        self._refuse([*check.unreachable(self), *check.cycles(self)])
        self._refuse([*check.dead_ends(self), *check.weights(self)])
        self.sources = tuple(self.edges[START])
        self.targets = tuple(dict.fromkeys(state.name for state in self.states if state.final))
        self.version = sha256(msgspec.json.encode(self._identity())).hexdigest()[:12]

    def _refuse(self, problems: Iterable[str]) -> None:
        found = list(problems)
        if found:
            raise GraphError(self.name, found)

    def _edges(self) -> dict[str, Sequence[str]]:
        """The nodes that may follow each node, and the start, on some walk."""
        heads: dict[str, dict[str, None]] = {name: {} for name in (START, *self.nodes)}
        for state in self.states:
            heads[state.name].update(dict.fromkeys(each.name for each in state.successors))
        return {name: tuple(found) for name, found in heads.items()}

    def _identity(self) -> dict[str, Any]:
        """What the graph's version is a hash of: everything that decides what a walk does."""
        return {
            "name": self.name,
            "given": [str(c) for c in self.given.values()],
            "goal": [str(c) for c in self.goal.values()],
            "weights": self.weights,
            "nodes": [
                {
                    "name": each.name,
                    "version": each.version,
                    "parameters": each.parameters_hash,
                    "reads": {f: type_name(t) for f, t in each.reads.items()},
                    "writes": {f: type_name(t) for f, t in each.writes.items()},
                    "preconditions": [str(c) for c in each.preconditions.values()],
                    "effects": [str(c) for c in each.effects.values()],
                }
                for each in self.nodes.values()
            ],
        }

    def _explore(self) -> list[State]:
        """Every distinguishable point of a walk, the start first, with what may follow it and by what weight."""
        seen: dict[tuple[str, frozenset[Condition]], State] = {}
        states = [self.start]
        for state in states:  # grows as it goes
            weights = self.weights.get(state.name, {})
            for each in [] if state.final else self.nodes.values():
                if not state.leads_to(each):
                    continue
                after = {**state.knowledge, **each.effects}
                key = (each.name, frozenset(after.values()))
                if key not in seen:
                    final = all(after.get(f, missing(f)).implies(c) for f, c in self.goal.items())
                    seen[key] = State(each, after, state, final)
                    states.append(seen[key])
                state.successors.append(seen[key])
                state.weights.append(float(weights.get(each.name, 1.0)))
            if len(states) > MAX_STATES:
                advice = "make one node of branches that differ in one value, or nest a part of the graph"
                self._refuse([f"more than {MAX_STATES} points of walks can be told apart; {advice}"])
        return states

    def describe(self, form: str = "text") -> str:
        """The graph for a person: form "text", or "mermaid" for a picture. Raises ConfigError for another form."""
        if form not in FORMS:
            raise ConfigError(f'a graph is described as {" or ".join(FORMS)}, not "{form}"')
        return FORMS[form](self)

    def as_node(self, name: str = "") -> Node:
        """The graph as one node, which reads the fields of `given` and writes those of `goal`.

        Its walks see the given fields alone, and only the goal's fields come out. Raises GraphError unless it has one
        source and one target.
        """
        for what, names in (("source", self.sources), ("target", self.targets)):
            if len(names) != 1:
                many = f"{len(names)} {what}s ({', '.join(names)})"
                raise GraphError(
                    self.name, [f"a graph that stands as a node has one source and one target, but this one has {many}"]
                )
        nodes, finals = self.nodes.values(), [state for state in self.states if state.final]
        reads = {f: narrowest(n.reads[f] for n in nodes if f in n.reads) or Any for f in self.given}
        writes = {f: reduce(or_, kinds) for f in self.goal if (kinds := [n.writes[f] for n in nodes if f in n.writes])}
        effects = {f: reduce(or_, [state.knowledge[f] for state in finals]) for f in writes}
        return Node(name or self.name, 1, reads, writes, self.given, effects, graph=self)
