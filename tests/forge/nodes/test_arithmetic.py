"""The addition problems that the demo learns from."""

from collections import Counter

import pytest

from engine import ConfigError
from forge import Draws, Graph, Reject, has, preview
from forge.nodes import arithmetic
from forge.run import RunSettings
from tests.forge.nodes_for_tests import call

NODES = (
    arithmetic.sample_operands,
    arithmetic.think_in_columns,
    arithmetic.conclude,
    arithmetic.answer_directly,
    arithmetic.check_answer,
    arithmetic.write_messages,
)


def problems(count, **parameters):
    return [call(arithmetic.sample_operands, {}, Draws(i), **parameters) for i in range(count)]


def trace(left, right, **parameters):
    return call(arithmetic.think_in_columns, {"left": left, "right": right}, **parameters)


def test_trace_adds_columns_from_the_right_with_carries():
    assert trace(57, 68) | {"thinking": True} == {"thinking": True, "thought": "7+8=15 5+6+1=12", "digits": [5, 2, 1]}
    assert trace(5, 994)["thought"] == "5+4=9 0+9=9 0+9=9"
    assert trace(0, 0)["digits"] == [0]


def test_trace_format_is_a_parameter():
    form = {"step": "{left}{right}{digit}{carry}", "step_carried": "{left}{right}{carry_in}{total}", "separator": ","}
    assert trace(57, 68, **form)["thought"] == "7851,56112"
    with pytest.raises(ConfigError, match=r"step is \"\{sum\}\".*it may use \{left\}"):
        trace(1, 2, step="{sum}")


def test_columns_give_the_sum():
    for problem in problems(300, min_digits=1, max_digits=18):
        left, right = problem["left"], problem["right"]
        answer = call(arithmetic.conclude, trace(left, right))
        assert answer == {"answer": str(left + right)}


def test_operands_have_the_digits_asked_for():
    lengths = Counter(len(str(p["left"])) for p in problems(900, min_digits=2, max_digits=4))
    assert sorted(lengths) == [2, 3, 4] and min(lengths.values()) > 240  # 300 expected, standard deviation 14


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_held_out_problems_are_those_of_the_rule(split):
    for problem in problems(300, split=split):
        assert problem["held_out"] == (split == "held_out")
        assert ((problem["left"] * 31 + problem["right"]) % 10 == 0) == (split == "held_out")


def test_nothing_is_held_out_on_request():
    drawn = problems(300, held_out_every=0)
    assert any((p["left"] * 31 + p["right"]) % 10 == 0 for p in drawn)
    assert not any(p["held_out"] for p in drawn)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"min_digits": 3, "max_digits": 2}, "operands of 3 to 2 digits"),
        ({"held_out_every": 1}, "held_out_every is 1"),
        ({"held_out_every": 0, "split": "held_out"}, "set it to 10"),
        ({"split": "test"}, "Invalid enum value"),
        ({"max_digit": 3}, 'did you mean "max_digits"'),
    ],
)
def test_parameters_that_cannot_be_used_are_refused(parameters, message):
    with pytest.raises(ConfigError, match=message):
        arithmetic.sample_operands.bind("s", parameters)


def test_split_that_holds_nothing_rejects_the_row():
    with pytest.raises(Reject, match="none of 10000 problems drawn is in the split held_out"):
        problems(1, min_digits=2, max_digits=2, held_out_every=100_000, split="held_out")


def test_checker_rejects_a_wrong_answer():
    check = arithmetic.check_answer
    assert call(check, {"left": 57, "right": 68, "answer": "125"}) == {"verdict": "correct"}
    for wrong in ("126", "0125", "", "125 "):
        with pytest.raises(Reject, match="57\\+68 is 125"):
            call(check, {"left": 57, "right": 68, "answer": wrong})


def test_conversations_think_or_answer_directly():
    graph = Graph("arithmetic", NODES, goal=[has("messages")])
    seen = set()
    for walk in preview(graph, RunSettings(), 40):
        record = walk.record
        user, assistant = record["messages"]
        answer = str(record["left"] + record["right"])
        assert user == {"role": "user", "content": f"{record['left']}+{record['right']}="}
        thought = f"<think>{trace(record['left'], record['right'])['thought']}</think>" if record["thinking"] else ""
        assert assistant == {"role": "assistant", "content": thought + answer}
        seen.add(record["thinking"])
    assert seen == {True, False}
