"""The addition problems that the demo learns from."""

from collections import Counter

import pytest

from engine import ConfigError
from forge import Draws, Graph, Reject, has, preview
from forge.nodes import arithmetic
from forge.nodes.arithmetic import is_held_out
from forge.run import RunSettings
from tests.forge.nodes_for_tests import call

NODES = (
    arithmetic.sample_operands,
    arithmetic.think_in_columns,
    arithmetic.think_at_a_glance,
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


def test_glance_thinks_nothing_through_and_answers_right():
    glance = call(arithmetic.think_at_a_glance, {"left": 57, "right": 68}, thought="simple")
    assert glance == {"thinking": True, "thought": "simple", "answer": "125"}


def test_operands_have_the_digits_asked_for():
    lengths = Counter(len(str(p["left"])) for p in problems(900, min_digits=2, max_digits=4))
    assert sorted(lengths) == [2, 3, 4] and min(lengths.values()) > 240  # 300 expected, standard deviation 14


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_problems_drawn_are_those_of_the_split(split):
    for problem in problems(300, split=split):
        assert problem["held_out"] == (split == "held_out") == is_held_out(problem["question"])


def test_held_out_rule_is_the_documented_hash():
    held_out = [q for q in (f"{left}+{right}=" for left in range(10, 13) for right in range(10, 30)) if is_held_out(q)]
    assert held_out == ["10+10=", "10+19=", "10+22=", "11+10=", "12+13="]


def test_held_out_split_is_a_fair_sample():
    """A tenth of the problems, with every last digit of the sum in both splits about as often."""
    digits = Counter((a + b) % 10 for a in range(100, 200) for b in range(100, 200) if is_held_out(f"{a}+{b}="))
    assert 900 < digits.total() < 1100  # 1000 expected, standard deviation 30
    assert all(60 < digits[digit] < 140 for digit in range(10))  # 100 expected, standard deviation 10


def test_nothing_is_held_out_on_request():
    drawn = problems(300, held_out_every=0)
    assert any(is_held_out(p["question"], 10) for p in drawn)
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
        problems(1, min_digits=2, max_digits=2, held_out_every=10**15, split="held_out")


def test_checker_rejects_a_wrong_answer():
    check = arithmetic.check_answer
    assert call(check, {"left": 57, "right": 68, "answer": "125"}) == {"verdict": "correct"}
    for wrong in ("126", "0125", "", "125 "):
        with pytest.raises(Reject, match="57\\+68 is 125"):
            call(check, {"left": 57, "right": 68, "answer": wrong})


def test_conversations_think_glance_or_answer_directly():
    graph = Graph("arithmetic", NODES, goal=[has("messages")])
    seen = set()
    for walk in preview(graph, RunSettings(), 40):
        record = walk.record
        user, assistant = record["messages"]
        answer = str(record["left"] + record["right"])
        assert user == {"role": "user", "content": f"{record['left']}+{record['right']}="}
        columns = trace(record["left"], record["right"])["thought"]
        contents = (
            [f"<think>{thought}</think>{answer}" for thought in (columns, "easy")] if record["thinking"] else [answer]
        )
        assert assistant["role"] == "assistant" and assistant["content"] in contents
        seen.add((record["thinking"], "=" in assistant["content"]))
    assert seen == {(True, True), (True, False), (False, False)}
