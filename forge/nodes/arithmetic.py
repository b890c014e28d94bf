"""Nodes that make addition problems with hybrid reasoning: a trace of thought, or a direct answer.

A problem is held out for evaluation exactly where the first 8 bytes of the SHA-256 of its question ("57+68="), read as
a big-endian integer, are a multiple of `held_out_every`. Whoever draws problems elsewhere keeps apart from the training
corpus by the same rule. It is a hash and no sum of the operands: (31 * left + right) % 10 would be (left + right) % 10,
which holds out every sum that ends in 0 and leaves that column unseen in training.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Literal

import msgspec

from engine import ConfigError
from forge.condition import equals, missing
from forge.draws import Draws
from forge.node import Reject, node

MAX_REDRAWS = 10_000


def is_held_out(question: str, held_out_every: int = 10) -> bool:
    """Whether the question belongs to the held-out split; with `held_out_every=0` none does."""
    if not held_out_every:
        return False
    return int.from_bytes(sha256(question.encode()).digest()[:8], "big") % held_out_every == 0


class OperandParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Each operand has `min_digits` to `max_digits` digits, each count as likely; one-digit operands include 0."""

    min_digits: int = 2
    max_digits: int = 4
    held_out_every: int = 10
    split: Literal["train", "held_out"] = "train"

    def __post_init__(self) -> None:
        if not 1 <= self.min_digits <= self.max_digits <= 18:
            raise ConfigError(
                f"operands of {self.min_digits} to {self.max_digits} digits cannot be drawn; "
                "it takes 1 <= min_digits <= max_digits <= 18"
            )
        if self.held_out_every < 0 or self.held_out_every == 1:
            raise ConfigError(f"held_out_every is {self.held_out_every}; it must be 0 (hold nothing out) or at least 2")
        if self.split == "held_out" and not self.held_out_every:
            raise ConfigError('split is "held_out" but held_out_every is 0, which holds nothing out; set it to 10')


class Problem(msgspec.Struct):
    """An addition problem and the question that poses it."""

    left: int
    right: int
    question: str
    held_out: bool


@node(version=1)
def sample_operands(parameters: OperandParameters, draws: Draws) -> Problem:
    """Draws operands until the problem falls into the split."""
    for _ in range(MAX_REDRAWS):
        left, right = (_operand(parameters, draws) for _ in range(2))
        question = f"{left}+{right}="
        held_out = is_held_out(question, parameters.held_out_every)
        if held_out == (parameters.split == "held_out"):
            return Problem(left, right, question, held_out)
    raise Reject(f"none of {MAX_REDRAWS} problems drawn is in the split {parameters.split}")


def _operand(parameters: OperandParameters, draws: Draws) -> int:
    digits = draws.integer(parameters.min_digits, parameters.max_digits)
    return draws.integer(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)


class TraceParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a column is written: `step` where nothing is carried in, `step_carried` where 1 is.

    Both may use {left}, {right}, {carry_in}, {total}, {digit} and {carry}, where
    left + right + carry_in = total = 10 * carry + digit.
    """

    step: str = "{left}+{right}={total}"
    step_carried: str = "{left}+{right}+1={total}"
    separator: str = " "

    def __post_init__(self) -> None:
        for key in ("step", "step_carried"):
            try:
                getattr(self, key).format(left=0, right=0, carry_in=0, total=0, digit=0, carry=0)
            except (KeyError, IndexError, ValueError, AttributeError) as error:
                raise ConfigError(
                    f'{key} is "{getattr(self, key)}", which cannot be filled in ({error}); it may use {{left}}, '
                    "{right}, {carry_in}, {total}, {digit} and {carry}"
                ) from None


class Operands(msgspec.Struct):
    left: int
    right: int


class Trace(msgspec.Struct):
    """A written-out column addition and the digits it found, the last digit of the sum first."""

    thinking: bool
    thought: str
    digits: list[int]


@node(version=1, preconditions=[missing("answer")], postconditions=[equals("thinking", True)])
def think_in_columns(operands: Operands, parameters: TraceParameters) -> Trace:
    """Adds column by column from the right, carrying."""
    width = max(len(str(operands.left)), len(str(operands.right)))
    steps, digits, carry = [], [], 0
    for place in range(width):
        left, right = (operand // 10**place % 10 for operand in (operands.left, operands.right))
        total = left + right + carry
        template = parameters.step_carried if carry else parameters.step
        steps.append(
            template.format(left=left, right=right, carry_in=carry, total=total, digit=total % 10, carry=total // 10)
        )
        digits.append(total % 10)
        carry = total // 10
    if carry:
        digits.append(carry)
    return Trace(True, parameters.separator.join(steps), digits)


class GlanceParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is thought where nothing is worked out."""

    thought: str = "easy"


class Glance(msgspec.Struct):
    thinking: bool
    thought: str
    answer: str


@node(version=1, preconditions=[missing("thinking")], postconditions=[equals("thinking", True)])
def think_at_a_glance(operands: Operands, parameters: GlanceParameters) -> Glance:
    """A thought that does no work before the answer: a habit that costs a model its accuracy, and worth unlearning."""
    return Glance(True, parameters.thought, str(operands.left + operands.right))


class Digits(msgspec.Struct):
    digits: list[int]


class Answer(msgspec.Struct):
    answer: str


@node(version=1, preconditions=[equals("thinking", True)])
def conclude(thought: Digits) -> Answer:
    """Reads the answer off the columns."""
    return Answer("".join(map(str, reversed(thought.digits))))


class DirectAnswer(msgspec.Struct):
    thinking: bool
    thought: str
    answer: str


@node(version=1, preconditions=[missing("thinking")], postconditions=[equals("thinking", False)])
def answer_directly(operands: Operands) -> DirectAnswer:
    """Answers without a thought."""
    return DirectAnswer(False, "", str(operands.left + operands.right))


class Claim(msgspec.Struct):
    left: int
    right: int
    answer: str


class Verdict(msgspec.Struct):
    verdict: str


@node(version=1, postconditions=[equals("verdict", "correct")])
def check_answer(claim: Claim) -> Verdict:
    """Rejects a row whose answer is not the sum."""
    expected = str(claim.left + claim.right)
    if claim.answer != expected:
        raise Reject(f'{claim.left}+{claim.right} is {expected}, not "{claim.answer}"')
    return Verdict("correct")


class Solved(msgspec.Struct):
    question: str
    thinking: bool
    thought: str
    answer: str


class Message(msgspec.Struct):
    role: Literal["system", "user", "assistant"]
    content: str


class Conversation(msgspec.Struct):
    messages: list[Message]


@node(version=1, preconditions=[equals("verdict", "correct")])
def write_messages(solved: Solved) -> Conversation:
    """The problem and its solution as a conversation, the thought in <think> tags."""
    thought = f"<think>{solved.thought}</think>" if solved.thinking else ""
    return Conversation([Message("user", solved.question), Message("assistant", thought + solved.answer)])
