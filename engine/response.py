"""A model's turn taken apart: thought, answer and tool calls (the format of Hermes 4, arXiv 2508.18255)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ToolCall:
    """A well-formed call: `{"name": ..., "arguments": {...}}`."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class MalformedToolCall:
    """What stood between the tags, and why it is no call."""

    text: str
    reason: str


@dataclass(frozen=True)
class Response:
    """A model's turn taken apart. `thought` is None where there is none; several are joined by a blank line. `faults`
    lists every departure from the format; it is empty exactly when the turn is well-formed."""

    thought: str | None
    answer: str
    tool_calls: list[ToolCall | MalformedToolCall] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def well_formed(self) -> bool:
        return not self.faults


_TAG = re.compile(r"</?(?:think|tool_call)>")


def parse_response(text: str, in_thought: bool = False) -> Response:
    """Takes apart `<think>...</think>` and `<tool_call>...</tool_call>`; never repairs, never guesses.

    A thought stands at the beginning or after a tool call, is closed, and holds no other; tags inside it that speak of
    tool calls are part of the thought. `in_thought=True`: the prompt had opened the thought already. Calls are strict
    JSON objects with a "name" and an "arguments" object; one that is not comes back as MalformedToolCall. An unclosed
    thought runs to the end: there is then no answer.
    """
    thoughts: list[str] = []
    answer: list[str] = []
    calls: list[ToolCall | MalformedToolCall] = []
    faults: list[str] = []
    at = begin = 0
    inside = "think" if in_thought else ""
    may_think = True
    for match in _TAG.finditer(text):
        tag = match.group()
        if inside == "think":
            if tag == "</think>":
                thoughts.append(text[begin : match.start()].strip())
                inside, at, may_think = "", match.end(), False
            elif tag == "<think>":
                faults.append("a <think> inside a thought")
        elif inside == "tool_call":
            if tag == "</tool_call>":
                calls.append(_parse_call(text[begin : match.start()]))
                inside, at, may_think = "", match.end(), True
        else:
            said = text[at : match.start()]
            answer.append(said)
            at = match.end()
            if tag in ("</think>", "</tool_call>"):
                faults.append(f"a {tag} that closes nothing")
                continue
            if tag == "<think>" and (said.strip() or not may_think):
                faults.append("a thought after the answer has begun")
            inside, begin = tag[1:-1], match.end()
    if inside == "think":
        thoughts.append(text[begin:].strip())
        faults.append("a <think> that is never closed")
    elif inside == "tool_call":
        calls.append(MalformedToolCall(text[begin:].strip(), "the <tool_call> is never closed"))
    else:
        answer.append(text[at:])
    faults += [f"a malformed tool call: {call.reason}" for call in calls if isinstance(call, MalformedToolCall)]
    return Response("\n\n".join(thoughts) if thoughts else None, "".join(answer).strip(), calls, faults)


def _parse_call(text: str) -> ToolCall | MalformedToolCall:
    text = text.strip()
    try:
        call = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        return MalformedToolCall(text, f"not JSON: {error}")
    if not isinstance(call, dict):
        return MalformedToolCall(text, f"a JSON {type(call).__name__}, expected an object")
    if not isinstance(call.get("name"), str) or not call["name"]:
        return MalformedToolCall(text, 'no "name" that is a non-empty string')
    if not isinstance(call.get("arguments"), dict):
        return MalformedToolCall(text, 'no "arguments" that is an object')
    if extra := sorted(set(call) - {"name", "arguments"}):
        return MalformedToolCall(text, f'unknown key "{extra[0]}"')
    return ToolCall(call["name"], call["arguments"])


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
