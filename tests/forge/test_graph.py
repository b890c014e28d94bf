"""Which edges follow from conditions, and which graphs are refused."""

import pytest

from forge import Graph, GraphError, differs, equals, has, missing, one_of
from forge.graph import MAX_STATES
from tests.forge.nodes_for_tests import branch, draw_number, halve, make

SEED, GOAL = make("seed", "", "seed"), [has("out")]


def edges(graph):
    return {(tail, head) for tail, heads in graph.edges.items() for head in heads}


def refused(*nodes, goal=GOAL, **options):
    with pytest.raises(GraphError) as caught:
        Graph("g", nodes, goal=goal, **options)
    return str(caught.value)


def test_edges_are_where_postconditions_satisfy_preconditions():
    graph = Graph(
        "g",
        [
            SEED,
            branch("think", "think"),
            branch("direct", "direct"),
            make("trace", "seed", "trace", requires=[equals("mode", "think")]),
            make("finish", "trace", "out"),
            make("answer", "seed", "out", requires=[one_of("mode", "direct", "brief")]),
        ],
        goal=GOAL,
    )
    assert edges(graph) == {
        ("start", "seed"),
        ("seed", "think"),
        ("seed", "direct"),
        ("think", "trace"),
        ("direct", "answer"),
        ("trace", "finish"),
    }
    assert graph.sources == ("seed",)
    assert set(graph.targets) == {"answer", "finish"}


def test_edge_may_rest_on_what_an_earlier_node_established():
    nodes = [
        SEED,
        branch("think", "think"),
        branch("direct", "direct"),
        make("middle", "mode", "text"),
        make("long", "text", "out", requires=[equals("mode", "think")]),
        make("short", "text", "out", requires=[differs("mode", "think")]),
    ]
    graph = Graph("g", nodes, goal=GOAL)
    assert {("middle", "long"), ("middle", "short")} <= edges(graph)
    after = {tuple(s.name for s in state.successors) for state in graph.states if state.name == "middle"}
    assert after == {("long",), ("short",)}  # each walk has its own


def test_node_that_satisfies_nothing_of_another_does_not_lead_to_it():
    nodes = [SEED, make("a", "seed", "a"), make("b", "seed", "b out", requires=[missing("a")]), make("c", "a", "out")]
    assert ("a", "b") not in edges(Graph("g", nodes, goal=GOAL))


def test_deleted_field_is_known_to_be_missing():
    nodes = [
        SEED,
        make("draft", "seed", "draft"),
        make("publish", "draft", "text", ensures=[missing("draft")]),
        make("sign", "text", "out", requires=[missing("draft")]),
    ]
    assert ("publish", "sign") in edges(Graph("g", nodes, goal=GOAL))


def test_duplicate_names_are_refused():
    assert '2 nodes are called "a"' in refused(SEED, make("a", "seed", "out"), make("a", "seed", "out"))
    assert 'a node is called "start"' in refused(make("start", "", "out"))


def test_goal_must_be_something_to_reach():
    assert "the goal is empty" in refused(SEED, goal=[])
    assert "the goal already holds" in refused(SEED, goal=[has("x")], given=[has("x")])
    assert 'the goal requires has("sed"), but no node writes "sed" (did you mean "seed"?)' in refused(
        SEED, goal=[has("sed")]
    )


def test_dangling_precondition_is_refused():
    text = refused(SEED, make("a", "sead", "out"))
    assert 'node "a" requires has("sead"), but no node writes "sead" (did you mean "seed"?)' in text
    text = refused(SEED, branch("think", "think"), make("a", "seed", "out", requires=[equals("mode", "thnik")]))
    assert 'requires equals("mode", \'thnik\'), which no node establishes: "think" establishes equals("mode", ' in text


def test_types_of_writer_and_reader_must_agree():
    text = refused(make("w", "", "x", kinds={"x": int}), make("r", "x", "out"))
    assert 'node "w" writes "x" as int, but node "r" reads it as str; declare one type in both' in text
    text = refused(
        make("w", "", "x", kinds={"x": bool}, ensures=[one_of("x", True, False)]),
        make("r", "", "out", requires=[differs("x", "yes")]),
    )
    assert "\"x\" is written as bool, which 'yes' is not" in text
    text = refused(make("a", "x", "y"), make("b", "x y", "out", kinds={"x": int}), given=[has("x")])
    assert 'disagree on the type of the given field "x": "a" as str, "b" as int' in text


def test_unreachable_node_is_refused():
    text = refused(
        SEED,
        branch("think", "think"),
        branch("direct", "direct"),
        make("trace", "mode", "trace out", requires=[equals("mode", "think")]),
        make("answer", "mode", "out", requires=[equals("mode", "direct")]),
        make("lost", "trace", "more", requires=[equals("mode", "direct")]),
    )
    assert 'node "lost" cannot be reached' in text and 'does not establish has("trace")' in text
    text = refused(SEED, make("a", "seed", "a"), make("end", "a", "out"), make("b", "", "b", requires=[missing("z")]))
    assert 'node "b" cannot be reached' not in text  # what requires nothing may come first


def test_cycle_is_refused_with_its_remedy():
    answer, end = make("answer", "seed", "answer"), make("end", "verdict", "out", requires=[missing("notes")])
    revise = make("revise", "verdict", "answer notes")
    text = refused(SEED, answer, make("judge", "answer", "verdict"), revise, end)
    assert "the edges judge -> revise -> judge form a cycle" in text
    assert 'exclude the second visit, for example missing("verdict") on node "judge"' in text
    text = refused(SEED, make("polish", "seed", "seed"), make("end", "seed", "out"))
    assert 'on a new field that node "polish" writes and requires to be missing' in text


def test_remedy_of_a_cycle_removes_it():
    nodes = [SEED, make("answer", "seed", "answer"), make("revise", "verdict", "answer notes")]
    judge = make("judge", "answer", "verdict", requires=[missing("verdict")])
    graph = Graph("g", [*nodes, judge, make("end", "notes", "out")], goal=GOAL)
    assert graph.edges["revise"] == ("end",)


def test_dead_end_is_refused():
    text = refused(
        SEED,
        branch("think", "think"),
        branch("direct", "direct"),
        make("trace", "mode", "out", requires=[equals("mode", "think")]),
    )
    assert "no node can follow the walk start -> seed -> direct and the goal does not hold" in text
    text = refused(SEED, make("a", "seed", "a"), make("b", "seed", "b"), make("c", "a b", "out"))
    assert "cannot be reached" in text and 'node "c"' in text


def test_weights_must_name_edges_and_leave_a_way():
    nodes = [SEED, make("a", "seed", "out"), make("b", "seed", "out")]
    assert 'weights are given for node "sed" (did you mean "seed"?)' in refused(*nodes, weights={"sed": {"a": 1}})
    assert 'seed -> c, which is no edge; from "seed" there are a, b' in refused(*nodes, weights={"seed": {"c": 1}})
    assert "the weight of seed -> a is -1" in refused(*nodes, weights={"seed": {"a": -1}})
    assert "start -> seed has weight 0" in refused(*nodes, weights={"seed": {"a": 0, "b": 0}})


def test_all_problems_are_reported_at_once():
    with pytest.raises(GraphError) as caught:
        Graph("g", [SEED, make("a", "p", "out"), make("b", "q", "out")], goal=GOAL)
    assert len(caught.value.problems) == 2


def test_walks_that_multiply_without_end_are_refused():
    knobs = [make("k0", "", "knob0")]
    for i in range(1, 16):
        knobs += [make(f"k{i}{v}", f"knob{i - 1}", f"knob{i}", ensures=[equals(f"knob{i}", v)]) for v in "ab"]
    assert f"more than {MAX_STATES} points" in refused(*knobs, make("end", "knob15", "out"))


def test_version_changes_with_whatever_a_walk_does():
    def graph(by=0, weight=1.0, name="g"):
        return Graph(
            name,
            [draw_number, halve.bind("halve", {"by": by})],
            goal=[has("half")],
            weights={"draw_number": {"halve": weight}},
        )

    assert graph().version == graph().version
    assert len({graph().version, graph(by=2).version, graph(weight=2.0).version, graph(name="h").version}) == 4


def test_description_shows_nodes_conditions_and_edges():
    graph = Graph(
        "g",
        [SEED, branch("think", "think"), branch("direct", "direct"), make("end", "mode", "out")],
        goal=GOAL,
        weights={"seed": {"think": 3.0}},
    )
    text = graph.describe()
    assert "->       think (3) | direct" in text
    assert "ensures  equals(\"mode\", 'think')" in text
    assert text.index("\nseed ") < text.index("\nthink ") < text.index("\nend ")
    assert "node_seed -->|3| node_think" in graph.describe("mermaid")
