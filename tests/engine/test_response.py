"""A model's turn taken apart; what is malformed is reported, never repaired."""

import pytest

from engine.response import MalformedToolCall, ToolCall, parse_response

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2, "it\'s"]}}\n</tool_call>'


def test_thought_and_answer():
    response = parse_response("<think>\n1 + 1 is 2\n</think>\nIt is 2.")
    assert (response.thought, response.answer, response.tool_calls) == ("1 + 1 is 2", "It is 2.", [])
    assert response.well_formed


def test_answer_without_thought():
    response = parse_response("It is 2.")
    assert response.thought is None and response.answer == "It is 2." and response.well_formed


def test_empty_thought_is_a_thought():
    response = parse_response("<think></think>2")
    assert response.thought == "" and response.answer == "2" and response.well_formed


def test_prompt_that_opened_the_thought():
    response = parse_response("so 2\n</think>2", in_thought=True)
    assert (response.thought, response.answer, response.faults) == ("so 2", "2", [])


def test_calls_between_thoughts():
    response = parse_response(f"<think>first</think>\n{CALL}\n<think>then</think>\n{CALL}{CALL}")
    call = ToolCall("add", {"a": 1, "b": [2, "it's"]})
    assert response.tool_calls == [call] * 3
    assert response.thought == "first\n\nthen" and response.answer == "" and response.well_formed


def test_call_inside_a_thought_is_thought():
    response = parse_response(f"<think>maybe {CALL}</think>no")
    assert response.tool_calls == [] and response.answer == "no" and response.well_formed
    assert CALL in response.thought


def test_text_around_a_call_is_the_answer():
    response = parse_response(f"Let me see. {CALL} Done.")
    assert response.answer == "Let me see.  Done." and len(response.tool_calls) == 1


def test_tags_inside_a_call_belong_to_it():
    response = parse_response('<tool_call>{"name": "say", "arguments": {"text": "<think>"}}</tool_call>')
    assert response.tool_calls == [ToolCall("say", {"text": "<think>"})] and response.well_formed


@pytest.mark.parametrize(
    ("text", "fault", "thought", "answer"),
    [
        ("<think>and on and on", "never closed", "and on and on", ""),
        ("2</think>", "closes nothing", None, "2"),
        ("2</tool_call>", "closes nothing", None, "2"),
        ("<think>a<think>b</think>c", "inside a thought", "a<think>b", "c"),
        ("2<think>late</think>", "after the answer", "late", "2"),
        ("<think>a</think><think>b</think>c", "after the answer", "a\n\nb", "c"),
    ],
)
def test_fault_is_reported(text, fault, thought, answer):
    response = parse_response(text)
    assert len(response.faults) == 1 and fault in response.faults[0]
    assert (response.thought, response.answer) == (thought, answer)


@pytest.mark.parametrize(
    ("inner", "reason"),
    [
        ("{'name': 'add', 'arguments': {}}", "not JSON"),
        ('{"name": "add", "arguments": {}', "not JSON"),
        ('{"name": "add", "arguments": {"a": NaN}}', "NaN is not JSON"),
        ('{"name": "add", "arguments": {}} and more', "not JSON"),
        ('["add", {}]', "a JSON list"),
        ('{"arguments": {}}', '"name"'),
        ('{"name": "", "arguments": {}}', '"name"'),
        ('{"name": "add"}', '"arguments"'),
        ('{"name": "add", "arguments": "{}"}', '"arguments"'),
        ('{"name": "add", "arguments": {}, "id": 1}', 'unknown key "id"'),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_malformed_call_is_reported_with_its_text(inner, reason):
    response = parse_response(f"<tool_call>{inner}</tool_call>")
    (call,) = response.tool_calls
    assert isinstance(call, MalformedToolCall) and call.text == inner and reason in call.reason
    assert not response.well_formed


def test_unclosed_call_is_malformed():
    (call,) = parse_response('<tool_call>{"name": "add", "arguments": {}}').tool_calls
    assert isinstance(call, MalformedToolCall) and "never closed" in call.reason
