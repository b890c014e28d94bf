"""A walk is a function of graph, seed and index; what nodes do wrong is data."""

import asyncio

import pytest

from forge import Graph, GraphError, Reject, equals, has, missing, node, one_of, take_walk
from tests.forge.nodes_for_tests import Half, Number, draw_number, halve, make

NUMBERS = Graph("numbers", [draw_number, halve], goal=[has("half")])


def walk(graph, seed=0, index=0, **options):
    return asyncio.run(take_walk(graph, seed, index, **options))


def test_walk_is_a_function_of_seed_and_index():
    def take(seed):
        return [walk(NUMBERS, seed, i) for i in range(20)]

    assert take(0) == take(0)
    assert [w.record for w in take(0)] != [w.record for w in take(1)]
    assert walk(NUMBERS, 0, 13) == take(0)[13]


def test_walk_records_each_call():
    done = next(w for w in (walk(NUMBERS, 0, i) for i in range(20)) if w.failure is None)
    assert [(c.node, c.version, c.wrote) for c in done.calls] == [
        ("draw_number", 3, ("number",)),
        ("halve", 1, ("half",)),
    ]
    assert done.calls[1].parameters == NUMBERS.nodes["halve"].parameters_hash
    assert done.record["half"] * 2 == done.record["number"]


def test_branches_are_taken_by_weight():
    nodes = [make("seed", "", "seed"), make("a", "seed", "out"), make("b", "seed", "out")]
    graph = Graph("g", nodes, goal=[has("out")], weights={"seed": {"a": 3.0}})
    share = sum(walk(graph, 0, i).calls[-1].node == "a" for i in range(2000)) / 2000
    assert 0.70 < share < 0.80  # 0.75 expected, standard deviation 0.01


def test_rejection_ends_the_walk_with_its_reason():
    rejected = next(w for w in (walk(NUMBERS, 0, i) for i in range(20)) if w.record["number"] % 2)
    assert rejected.failure.kind == "rejected" and rejected.failure.node == "halve"
    assert rejected.failure.reason == f"{rejected.record['number']} is odd"
    assert [call.node for call in rejected.calls] == ["draw_number"]


def test_exception_is_a_failure_of_the_row():
    fifty = next(w for w in (walk(NUMBERS, 0, i) for i in range(2000)) if w.record["number"] == 50)
    assert (fifty.failure.kind, fifty.failure.reason) == ("failed", "OverflowError: fifty")


def test_retry_calls_again_with_fresh_draws_but_not_after_a_rejection():
    calls = []

    def flaky(record, draws):
        calls.append(draws.word())
        if len(calls) < 3:
            raise TimeoutError("try again")
        raise Reject("no")

    graph = Graph("g", [make("flaky", "", "out", run=flaky)], goal=[has("out")])
    assert walk(graph, retries=1).failure.kind == "failed" and len(calls) == 2
    assert walk(graph, retries=5).failure.kind == "rejected" and len(calls) == 3
    assert calls[0] != calls[1]


def test_broken_promise_is_an_invalid_row():
    @node(postconditions=[equals("half", 1)])
    def liar() -> Half:
        return Half(2)

    @node()
    def untyped() -> Number:
        return Number("x")  # type: ignore[arg-type]

    failure = walk(Graph("g", [liar], goal=[has("half")])).failure
    assert (failure.kind, failure.reason) == ("invalid", 'broke its postcondition equals("half", 1)')
    assert walk(Graph("g", [untyped], goal=[has("number")])).failure.kind == "invalid"


def test_field_promised_missing_is_deleted():
    nodes = [make("draft", "", "draft"), make("publish", "draft", "out", ensures=[missing("draft")])]
    assert walk(Graph("g", nodes, goal=[has("out")])).record == {"out": "publish.out"}


def inner():
    nodes = [make("first", "seed", "scratch"), make("second", "scratch", "mid")]
    return Graph("inner", nodes, goal=[has("mid")], given=[has("seed")])


def test_graph_with_one_source_and_one_target_is_a_node():
    graph = Graph("outer", [make("seed", "", "seed"), inner(), make("last", "mid", "out")], goal=[has("out")])
    assert graph.edges["seed"] == ("inner",) and graph.edges["inner"] == ("last",)
    done = walk(graph)
    assert [call.node for call in done.calls] == ["seed", "inner/first", "inner/second", "last"]
    assert done.record == {"seed": "seed.seed", "mid": "second.mid", "out": "last.out"}  # the scratch stays inside


def test_graphs_nest_to_any_depth():
    middle = Graph("middle", [inner(), make("wrap", "mid", "wrapped")], goal=[has("wrapped")], given=[has("seed")])
    graph = Graph("outer", [make("seed", "", "seed"), middle, make("last", "wrapped", "out")], goal=[has("out")])
    assert [c.node for c in walk(graph).calls] == [
        "seed", "middle/inner/first", "middle/inner/second", "middle/wrap", "last",
    ]  # fmt: skip


def test_nested_graph_draws_its_own_numbers():
    nested = Graph("nested", [draw_number], goal=[has("number")])
    record = walk(Graph("outer", [nested, halve], goal=[has("half")]), 0, 4).record
    assert record["number"] != walk(nested, 0, 4).record["number"]


def test_failure_inside_a_nested_graph_names_the_way_to_it():
    def refuse(record, draws):
        raise Reject("no")

    nested = Graph("nested", [make("a", "", "a"), make("b", "a", "b", run=refuse)], goal=[has("b")])
    failed = walk(Graph("outer", [nested, make("c", "b", "out")], goal=[has("out")]))
    assert failed.failure.node == "nested/b"
    assert failed.record == {"a": "a.a"}


def test_what_a_nested_graph_establishes_is_what_any_of_its_walks_may_leave():
    nodes = [make("pick", "", "x"), *(make(v, "x", "mode tail", ensures=[equals("mode", v)]) for v in "ab")]
    nested = Graph("nested", [*nodes, make("end", "tail", "out")], goal=[has("out"), has("mode")])
    assert nested.as_node().effects == {"out": has("out"), "mode": one_of("mode", "a", "b")}


def test_graph_with_two_targets_is_no_node():
    nested = Graph("nested", [make("x", "", "x"), make("a", "x", "out"), make("b", "x", "out")], goal=[has("out")])
    with pytest.raises(GraphError, match=r"one source and one target, but this one has 2 targets \(a, b\)"):
        nested.as_node()
