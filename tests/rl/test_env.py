"""Environments: what they pose, how they reward, how they are found by name."""

import asyncio

import pytest

from engine import ConfigError
from rl.env import Action, Environment, SingleTurn, make_environment
from rl.envs.arithmetic import Arithmetic


def reward(env, problem, text, finish_reason="stop"):
    return asyncio.run(SingleTurn(env, problem).step(Action(text, [], finish_reason))).reward


def test_problems_are_a_function_of_index_and_seed():
    first, again = Arithmetic(), Arithmetic()
    assert [first.problem(i, 3) for i in range(50)] == [again.problem(i, 3) for i in reversed(range(50))][::-1]
    assert [first.problem(i, 3) for i in range(50)] != [first.problem(i, 4) for i in range(50)]


def test_held_out_problems_are_never_trained_on():
    env = Arithmetic(min_digits=1, max_digits=2)
    trained = {env.problem(i, 0).messages[0]["content"] for i in range(2000)}
    held_out = {env.problem(i, 0, held_out=True).messages[0]["content"] for i in range(2000)}
    assert not trained & held_out
    assert all(map(env.is_held_out, held_out)) and not any(map(env.is_held_out, trained))


def test_every_last_digit_of_the_sum_is_in_both_splits():
    env = Arithmetic()
    for held_out in (False, True):
        assert {env.problem(i, 0, held_out).data[-1] for i in range(300)} == set("0123456789")


@pytest.mark.parametrize(
    ("thinking", "text", "finish_reason", "expected"),
    [
        (True, "<think>7+5=12</think>{sum}", "stop", 1.0),
        (True, "<think></think>{sum}", "stop", 1.0),
        (True, "<think>7+5=12</think>1", "stop", 0.0),
        (True, "{sum}", "stop", 0.0),
        (True, "<think>{sum}", "stop", 0.0),
        (True, "<think>a</think><think>b</think>{sum}", "stop", 0.0),
        (True, "<think>7+5=12</think>{sum}", "length", 0.0),
        (False, "{sum}", "stop", 1.0),
        (False, "{sum} ", "stop", 0.0),
        (False, "<think>7+5=12</think>{sum}", "stop", 0.0),
    ],
)
def test_reward_is_for_the_sum_in_the_format_of_the_mode(thinking, text, finish_reason, expected):
    env = Arithmetic(thinking_share=float(thinking))
    problem = env.problem(0, 0)
    assert problem.thinking == thinking
    assert reward(env, problem, text.format(sum=problem.data), finish_reason) == expected


def test_environments_are_found_by_file_or_by_class():
    assert isinstance(make_environment("arithmetic", {"max_digits": 4}), Arithmetic)
    assert isinstance(make_environment("rl.envs.arithmetic:Arithmetic", {}), Arithmetic)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("arithmetics", {}, "cannot be loaded"),
        ("rl.env:Problem", {}, "not a subclass"),
        ("arithmetic", {"digits": 3}, "does not take these arguments.*digits"),
        ("arithmetic", {"min_digits": 5}, "5 to 3 digits"),
        ("arithmetic", {"held_out_every": 1}, "held_out_every is 1"),
        ("arithmetic", {"thinking_share": 2.0}, "thinking_share is 2.0"),
    ],
)
def test_an_environment_that_cannot_be_made_says_why(name, arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_environment(name, arguments)


def test_an_environment_without_problems_or_scores_says_what_it_lacks():
    with pytest.raises(TypeError, match="Environment does not define problem"):
        Environment().problem(0, 0)
