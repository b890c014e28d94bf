"""A graph of nodes whose edges follow from conditions, checked when it is made.

A walk starts with the fields that `given` establishes, and ends as soon as `goal` holds. After node A, node B may follow
exactly where what is then known implies every precondition of B, and A wrote at least one field that B's preconditions
name. What is known is followed along each walk, so an edge may rest on what an earlier node established. The nodes that
may come first are the sources, those after which the goal holds the targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from hashlib import sha256
from operator import or_
from typing import Any

import msgspec

from engine import ConfigError
from forge.condition import Condition, merge, missing
from forge.fieldtype import assignable, has_type, narrowest, type_name
from forge.node import Node, NodeKind, nearest
from forge.picture import FORMS

START = "start"
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

    def path(self) -> str:
        """One walk that leads here, as text."""
        return self.name if self.previous is None else f"{self.previous.path()} -> {self.name}"

    def lacks(self, node: Node) -> list[Condition]:
        """The preconditions of the node that what is known here does not imply."""
        return [c for c in node.preconditions.values() if not self.knowledge.get(c.field, missing(c.field)).implies(c)]


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
        for problems in (self._declared(listed), self._readable()):
            self._raise(problems)
        self.start = State(None, dict(self.given))
        self.states = self._explore()
        self.edges = {
            tail: {s.name: s for state in self.states if state.name == tail for s in state.successors}.keys()
            for tail in (START, *self.nodes)
        }
        self._raise([*self._unreachable(), *self._cycles()])
        self._raise([*self._dead_ends(), *self._weigh()])
        self.sources = tuple(self.edges[START])
        self.targets = tuple(dict.fromkeys(state.name for state in self.states if state.final))
        self.version = sha256(msgspec.json.encode(self._identity())).hexdigest()[:12]

    def _raise(self, problems: Iterable[str]) -> None:
        found = list(problems)
        if found:
            raise GraphError(self.name, found)

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

    # Checks, in the order in which one problem would hide behind another.

    def _declared(self, listed: list[Node]) -> Iterator[str]:
        """Names, the goal, and preconditions that no node could ever satisfy."""
        names = [each.name for each in listed]
        for name in dict.fromkeys(n for n in names if names.count(n) > 1):
            yield f'{names.count(name)} nodes are called "{name}"; bind all but one to another name'
        if START in names:
            yield f'a node is called "{START}", which names the beginning of a walk; give it another name'
        if not self.goal:
            yield "the goal is empty, so no walk has an end; name the fields a finished record has"
        elif all(self.given.get(f, missing(f)).implies(c) for f, c in self.goal.items()):
            yield "the goal already holds before the first node; name a field that a node writes"
        for condition in self.goal.values():
            yield from self._dangling("the goal requires", condition)
        for each in listed:
            for condition in each.preconditions.values():
                yield from self._dangling(f'node "{each.name}" requires', condition)

    def _dangling(self, who: str, condition: Condition) -> Iterator[str]:
        name = condition.field
        writers = {n.name: n.effects[name] for n in self.nodes.values() if name in n.effects}
        before = self.given.get(name, missing(name))
        if before.implies(condition) or any(effect.implies(condition) for effect in writers.values()):
            return
        if writers:
            offers = "; ".join(f'"{writer}" establishes {effect}' for writer, effect in writers.items())
            yield f"{who} {condition}, which no node establishes: {offers}; change the condition or a postcondition"
        else:
            known = {f for n in self.nodes.values() for f in n.writes} | set(self.given)
            yield f'{who} {condition}, but no node writes "{name}"{nearest(name, known)}; add a node that does'

    def _readable(self) -> Iterator[str]:
        """Types: of every writer against every reader of a field, and of the values in conditions."""
        nodes = self.nodes.values()
        for reader in nodes:
            for name, kind in reader.reads.items():
                for writer in nodes:
                    if name in writer.writes and not assignable(writer.writes[name], kind):
                        yield (
                            f'node "{writer.name}" writes "{name}" as {type_name(writer.writes[name])}, but node '
                            f'"{reader.name}" reads it as {type_name(kind)}; declare one type in both'
                        )
        for name in self.given:
            readers = {n.name: n.reads[name] for n in nodes if name in n.reads}
            if readers and narrowest(readers.values()) is None:
                kinds = ", ".join(f'"{reader}" as {type_name(kind)}' for reader, kind in readers.items())
                yield f'nodes disagree on the type of the given field "{name}": {kinds}; declare one type in all'
        for each in nodes:
            for condition in (*each.preconditions.values(), *each.effects.values()):
                kinds = [n.writes[condition.field] for n in nodes if condition.field in n.writes]
                for value in sorted(condition.values, key=repr):
                    if kinds and not any(has_type(value, kind) for kind in kinds):
                        yield (
                            f'node "{each.name}" has the condition {condition}, but "{condition.field}" is written as '
                            f"{type_name(kinds[0])}, which {value!r} is not; correct the value"
                        )

    def _explore(self) -> list[State]:
        """Every distinguishable point of a walk, the start first."""
        seen: dict[tuple[str, frozenset[Condition]], State] = {}
        states = [self.start]
        for state in states:  # grows as it goes
            if state.final:
                continue
            for each in self.nodes.values():
                follows = state.node is None or any(name in each.preconditions for name in state.node.effects)
                if not follows or state.lacks(each):
                    continue
                after = {**state.knowledge, **each.effects}
                key = (each.name, frozenset(after.values()))
                if key not in seen:
                    final = all(after.get(f, missing(f)).implies(c) for f, c in self.goal.items())
                    seen[key] = State(each, after, state, final)
                    states.append(seen[key])
                    if len(states) > MAX_STATES:
                        raise GraphError(
                            self.name,
                            [
                                f"more than {MAX_STATES} points of walks can be told apart; make one node of branches "
                                "that differ in one value, or nest a part of the graph"
                            ],
                        )
                state.successors.append(seen[key])
        return states

    def _unreachable(self) -> Iterator[str]:
        reached = {state.name for state in self.states}
        for each in self.nodes.values():
            if each.name in reached:
                continue
            closest = min((s for s in self.states if not s.final), key=lambda state: len(state.lacks(each)))
            lacks = closest.lacks(each)
            if lacks:
                needs = " and ".join(map(str, lacks))
                yield (
                    f'node "{each.name}" cannot be reached: the closest walk, {closest.path()}, does not establish '
                    f"{needs}; add a node there that does, or drop the condition"
                )
            else:
                yield (
                    f'node "{each.name}" cannot be reached: its preconditions hold after {closest.path()}, but '
                    f'"{closest.name}" writes none of the fields they name; require one that it writes'
                )

    def _cycles(self) -> Iterator[str]:
        """One cycle of the edges, if there is one (depth-first search)."""
        done: set[str] = set()

        def visit(name: str, trail: list[str]) -> list[str] | None:
            if name in trail:
                return [*trail[trail.index(name) :], name]
            if name in done:
                return None
            found = next((cycle for head in self.edges[name] if (cycle := visit(head, [*trail, name]))), None)
            done.add(name)
            return found

        cycle = visit(START, [])
        if cycle:
            wrote = next(iter(self.nodes[cycle[0]].writes), "")
            yield (
                f"the edges {' -> '.join(cycle)} form a cycle; let a precondition exclude the second visit, for "
                f'example missing("{wrote}") on node "{cycle[0]}"'
            )

    def _dead_ends(self) -> Iterator[str]:
        goal = Node("goal", 0, {}, {}, self.goal, {})
        reported: set[str] = set()
        for state in self.states:
            if state.final or state.successors or state.name in reported:
                continue
            reported.add(state.name)
            where = f"no node can follow the walk {state.path()} and the goal does not hold"
            rest = [each for each in self.nodes.values() if each is not state.node]
            held = [each.name for each in rest if not state.lacks(each) and each.name not in state.path().split(" -> ")]
            if held:
                yield (
                    f'{where}; the preconditions of node "{held[0]}" hold, but "{state.name}" writes none of the fields '
                    "they name: require one that it writes"
                )
                continue
            closest = min((goal, *rest), key=lambda each: len(state.lacks(each)) or len(each.preconditions) + 1)
            needs = " and ".join(map(str, state.lacks(closest)))
            who = "the goal" if closest is goal else f'node "{closest.name}"'
            yield f'{where}; {who} is closest and lacks {needs}: let a node after "{state.name}" establish it'

    def _weigh(self) -> Iterator[str]:
        """Puts the weights on the states' edges; yields what is wrong with them."""
        for tail, heads in self.weights.items():
            if tail not in self.edges:
                yield f'weights are given for node "{tail}"{nearest(tail, self.edges)}, which the graph does not have'
                continue
            for head, weight in heads.items():
                edges = list(self.edges[tail])
                if head not in edges:
                    yield (
                        f'a weight is given for {tail} -> {head}{nearest(head, edges)}, which is no edge; from "{tail}" '
                        f"there are {', '.join(edges) or 'none'}"
                    )
                if not 0.0 <= weight < float("inf"):
                    yield f"the weight of {tail} -> {head} is {weight}; it must be 0 or more, and finite"
        for state in self.states:
            given = self.weights.get(state.name, {})
            state.weights = [float(given.get(s.name, 1.0)) for s in state.successors]
            if state.successors and not any(weight > 0 for weight in state.weights):
                yield f"every edge that can follow {state.path()} has weight 0; give one of them more"

    def describe(self, form: str = "text") -> str:
        """The graph for a person: form "text", or "mermaid" for a picture. Raises ConfigError for another form."""
        if form not in FORMS:
            raise ConfigError(f'a graph is described as {" or ".join(FORMS)}, not "{form}"')
        return FORMS[form](self)

    # A graph as a node.

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
        writes = {f: reduce(or_, [n.writes[f] for n in nodes if f in n.writes]) for f in self.goal if self._writes(f)}
        effects = {f: reduce(or_, [state.knowledge[f] for state in finals]) for f in writes}
        return Node(name or self.name, 1, reads, writes, self.given, effects, graph=self)

    def _writes(self, name: str) -> bool:
        return any(name in each.writes for each in self.nodes.values())
