"""PTX text, as Triton or nvcc write it, taken apart: `parse(text).kernels[name].instructions`.

Everything is named once: registers get a number in the file of their width, labels and registers of an inner `{ }` are
kept apart from those outside, so a kernel is one flat list of instructions. Debug information is skipped.
"""

from __future__ import annotations

import re
from bisect import bisect_left

import numpy as np

from tests.ptx.syntax import (
    Address,
    Immediate,
    Instruction,
    Kernel,
    Module,
    Negated,
    Operand,
    Pair,
    PTXError,
    Register,
    Sink,
    Special,
    Symbol,
    Variable,
    Vector,
    size_of,
)  # fmt: skip

_FILE_OF = {
    "pred": "pred", "b8": "b16", "u8": "b16", "s8": "b16", "b16": "b16", "u16": "b16", "s16": "b16", "f16": "b16",
    "bf16": "b16", "b32": "b32", "u32": "b32", "s32": "b32", "f32": "b32", "f16x2": "b32", "bf16x2": "b32",
    "b64": "b64", "u64": "b64", "s64": "b64", "f64": "b64", "b128": "b128",
}  # fmt: skip
_LINE_DIRECTIVES = (".version", ".target", ".address_size", ".loc", ".file")
_LABEL = re.compile(r"([A-Za-z_$%][\w$]*)\s*:(?!:)")
_VARIABLE = re.compile(
    r"\.(?P<space>shared|global|const|local|param)\b(?P<middle>[^=]*?)\.(?P<type>[busf]\d+|pred)\s+"
    r"(?P<name>[\w$]+)\s*(?P<array>\[\s*\d*\s*\])?\s*(?:=\s*(?P<data>.*))?$", re.S,
)  # fmt: skip
_PARAMETER = re.compile(
    r"\.param\b(?P<before>[^,)]*?)\.(?P<type>[busf]\d+)(?P<after>[^,)\[]*?)\s(?P<name>[\w$]+)\s*(?P<array>\[\s*\d*\s*\])?$",
    re.S,
)
_ALIGN = re.compile(r"\.align\s+(\d+)")
_NUMBER = re.compile(r"-?\s*(0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?|\d+U?)$")


def parse(text: str, kernels: str = "") -> Module:
    """`kernels` is a regular expression: those in whose names it is not found are left out. Raises PTXError where the
    text is not understood."""
    return _Parser(_without_comments(text), kernels).module()


def _without_comments(text: str) -> str:
    """Block comments become as many line ends, so that line numbers stay."""
    text = re.sub(r"/\*.*?\*/", lambda found: "\n" * found.group().count("\n"), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


class _Scope:
    """The names of one `{ }`."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.registers: dict[str, Register] = {}
        self.ranges: list[tuple[str, int, str, int]] = []  # prefix, how many, file, first index
        self.labels: set[str] = set()


class _Parser:
    def __init__(self, text: str, kernels: str) -> None:
        self.text = text
        self.wanted = re.compile(kernels)
        self.at = 0
        self.result = Module()
        self.ends = [found.start() for found in re.finditer("\n", text)]

    def line(self, at: int) -> int:
        return bisect_left(self.ends, at) + 1

    def fail(self, what: str, at: int) -> PTXError:
        return PTXError(f"line {self.line(at)}: {what}: {self.text[at : at + 120].strip()!r}")

    def skip_space(self) -> bool:
        """False at the end of the text."""
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.at < len(self.text)

    def directive_line(self) -> bool:
        """Skips a directive that ends with its line."""
        if not self.text.startswith(_LINE_DIRECTIVES, self.at):
            return False
        end = self.text.find("\n", self.at)
        self.at = len(self.text) if end < 0 else end
        return True

    def module(self) -> Module:
        while self.skip_space():
            if self.directive_line():
                continue
            if self.text.startswith(".section", self.at):
                self.at = self.matching(self.text.index("{", self.at)) + 1
                continue
            stop = re.compile(r"[;{]").search(self.text, self.at)
            if stop is None:
                raise self.fail("a declaration without an end", self.at)
            head = self.text[self.at : stop.start()]
            if ".entry" in head:
                self.kernel(head, stop.start())
            elif ".func" in head:
                raise self.fail("functions are not known to the simulator", self.at)
            else:
                end = self.text.index(";", self.at)
                declaration = self.text[self.at : end]
                if ".pragma" not in declaration:
                    self.declare(declaration, self.result.variables)
                self.at = end + 1
        return self.result

    def matching(self, opening: int) -> int:
        depth = 0
        for found in re.compile("[{}]").finditer(self.text, opening):
            depth += 1 if found.group() == "{" else -1
            if depth == 0:
                return found.start()
        raise self.fail("a brace that is not closed", opening)

    def declare(self, declaration: str, variables: dict[str, Variable], prefix: str = "") -> None:
        declaration = declaration.strip()
        found = _VARIABLE.search(declaration)
        if not found:
            raise PTXError(f"line {self.line(self.at)}: a declaration that is not understood: {declaration[:120]!r}")
        each = size_of(found["type"])
        count = int(found["array"].strip("[] \t") or 0) if found["array"] else 1
        align = max(each, int((_ALIGN.search(declaration) or [0, 1])[1]))
        end = max((v.offset + v.size for v in variables.values() if v.space == found["space"]), default=0)
        data = b""
        if found["data"]:
            numbers = [int(number, 0) for number in re.findall(r"-?\w+", found["data"])]
            data = b"".join((number % 256**each).to_bytes(each, "little") for number in numbers)
        name = prefix + found["name"]
        variables[name] = Variable(found["name"], found["space"], -(-end // align) * align, each * count, align, data)

    def kernel(self, head: str, opening: int) -> None:
        name = re.search(r"\.entry\s+([\w$]+)", head)
        assert name
        if not self.wanted.search(name[1]):
            self.at = self.matching(opening) + 1
            return
        kernel = Kernel(name[1])
        inside = head[head.index("(") + 1 : head.rindex(")")] if "(" in head else ""
        offset = 0
        for declaration in filter(None, (each.strip() for each in inside.split(","))):
            found = _PARAMETER.match(declaration)
            if not found:
                raise PTXError(f"a parameter of {name[1]} that is not understood: {declaration!r}")
            each = size_of(found["type"])
            count = int(found["array"].strip("[] \t")) if found["array"] else 1
            aligned = _ALIGN.search(found["before"])
            align = max(each, int(aligned[1]) if aligned else 1)
            offset = -(-offset // align) * align
            kernel.parameters.append(Variable(found["name"], "param", offset, each * count, align))
            offset += each * count
        threads = re.search(r"\.(?:reqntid|maxntid)\s+([\d\s,]+)", head)
        if threads:
            kernel.threads = int(np.prod([int(each) for each in threads[1].split(",")]))
        if registers := re.search(r"\.maxnreg\s+(\d+)", head):
            kernel.thread_registers = int(registers[1])
        self.result.kernels[kernel.name] = kernel
        self.at = opening + 1
        self.body(kernel)

    def body(self, kernel: Kernel) -> None:
        scopes, count = [_Scope("")], 0
        self.find_labels(scopes[0])
        while True:
            if not self.skip_space():
                raise PTXError(f"{kernel.name} is not closed")
            if self.directive_line():
                continue
            character = self.text[self.at]
            if character == ";":
                self.at += 1
            elif character == "{":
                count += 1
                scopes.append(_Scope(f"{scopes[-1].prefix}{count}:"))
                self.at += 1
                self.find_labels(scopes[-1])
            elif character == "}":
                self.at += 1
                scopes.pop()
                if not scopes:
                    return
            elif label := _LABEL.match(self.text, self.at):
                kernel.labels[scopes[-1].prefix + label[1]] = len(kernel.instructions)
                self.at = label.end()
            else:
                end = self.text.index(";", self.at)
                self.statement(self.text[self.at : end], kernel, scopes)
                self.at = end + 1

    def find_labels(self, scope: _Scope) -> None:
        """The labels of the scope that begins here: a branch may come before its label."""
        depth = 0
        for found in re.compile(r"[{}]|(?<=[\s;{}])[A-Za-z_$][\w$]*\s*:(?!:)").finditer(self.text, self.at - 1):
            if found.group() == "{":
                depth += found.start() >= self.at
            elif found.group() == "}":
                depth -= 1
                if depth < 0:
                    return
            elif depth == 0:
                scope.labels.add(found.group()[:-1].strip())

    def statement(self, text: str, kernel: Kernel, scopes: list[_Scope]) -> None:
        if text.startswith(".reg"):
            self.registers(text, kernel, scopes[-1])
            return
        if text.startswith(".pragma"):
            return
        if text.startswith(".branchtargets"):  # of the label just before it
            targets = [self.name(each, kernel, scopes) for each in _split(text.removeprefix(".branchtargets"))]
            kernel.tables[next(reversed(kernel.labels))] = [each.name for each in targets if isinstance(each, Symbol)]
            return
        if text.startswith("."):
            self.declare(text, kernel.variables, scopes[-1].prefix)
            return
        line, predicate, negated = self.line(self.at), None, False
        stripped = " ".join(text.split())
        if stripped.startswith("@"):
            guard, _, rest = stripped.partition(" ")
            negated, word = guard.startswith("@!"), guard.lstrip("@!")
            found = self.name(word, kernel, scopes)
            if not isinstance(found, Register) or found.file != "pred":
                raise PTXError(f"line {line}: {stripped}: {word} is no predicate")
            predicate = found
        else:
            rest = stripped
        word, _, operands = rest.partition(" ")
        opcode, *modifiers = word.split(".")
        try:
            parsed = tuple(self.operand(each, kernel, scopes) for each in _split(operands))
        except (ValueError, KeyError) as error:
            raise PTXError(f"line {line}: {stripped}: {error}") from error
        kernel.instructions.append(
            Instruction(opcode, tuple(modifiers), parsed, predicate, negated, len(kernel.instructions), line, stripped)
        )

    def registers(self, text: str, kernel: Kernel, scope: _Scope) -> None:
        found = re.match(r"\.reg\s+(?:\.v\d\s+)?\.(\w+)\s+(.*)", text, re.S)
        if not found or found[1] not in _FILE_OF:
            raise self.fail("registers that are not understood", self.at)
        file = _FILE_OF[found[1]]
        for each in found[2].split(","):
            each = each.strip()
            counted = re.match(r"([\w$%]+)<(\d+)>$", each)
            number = int(counted[2]) if counted else 1
            first = kernel.registers[file]
            kernel.registers[file] += number
            if counted:
                scope.ranges.append((counted[1], number, file, first))
            else:
                scope.registers[each] = Register(scope.prefix + each, file, first)

    def name(self, word: str, kernel: Kernel, scopes: list[_Scope]) -> Operand:
        for scope in reversed(scopes):
            if word in scope.registers:
                return scope.registers[word]
            for prefix, number, file, first in scope.ranges:
                suffix = word[len(prefix) :]
                if word.startswith(prefix) and suffix.isdigit() and int(suffix) < number:
                    scope.registers[word] = Register(scope.prefix + word, file, first + int(suffix))
                    return scope.registers[word]
            if word in scope.labels:
                return Symbol(scope.prefix + word)
            if scope.prefix + word in kernel.variables:
                return Symbol(scope.prefix + word)
        if word.startswith("%"):
            return Special(word)
        if not re.fullmatch(r"[A-Za-z_$][\w$]*", word):
            raise ValueError(f"{word!r} is not understood")
        return Symbol(word)

    def operand(self, text: str, kernel: Kernel, scopes: list[_Scope]) -> Operand:
        text = text.strip()
        if text == "_":
            return Sink()
        if text.startswith("["):
            inside = _split(text[1:-1])
            base, offset = inside[0].strip(), 0
            found = re.match(r"(.+?)\s*([+-])\s*(-?\s*\w+)$", base)
            if found:
                base, offset = found[1], int(found[3].replace(" ", ""), 0) * (1 if found[2] == "+" else -1)
            coordinates: tuple[Operand, ...] = ()
            if len(inside) > 1:
                vector = self.operand(inside[1], kernel, scopes)
                coordinates = vector.elements if isinstance(vector, Vector) else (vector,)
            return Address(self.operand(base, kernel, scopes), offset, coordinates)
        if text.startswith("{"):
            return Vector(tuple(self.operand(each, kernel, scopes) for each in _split(text[1:-1])))
        if text.startswith("!"):
            return Negated(self.operand(text[1:], kernel, scopes))
        if "|" in text:
            first, second = text.split("|")
            return Pair(self.operand(first, kernel, scopes), self.operand(second, kernel, scopes))
        if _NUMBER.match(text):
            return _immediate(text.replace(" ", ""))
        return self.name(text, kernel, scopes)


def _immediate(text: str) -> Immediate:
    negative, text = text.startswith("-"), text.lstrip("-").removesuffix("U")
    if text[:2].lower() == "0f" or text[:2].lower() == "0d":
        single = text[:2].lower() == "0f"
        bits = int(text[2:], 16) ^ ((1 << (31 if single else 63)) if negative else 0)
        return Immediate(bits, "f32" if single else "f64")
    base = 16 if text[:2].lower() == "0x" else 8 if len(text) > 1 and text[0] == "0" else 10
    return Immediate(-int(text, base) if negative else int(text, base), "int")


def _split(text: str) -> list[str]:
    """At the commas that are in no bracket."""
    parts, depth, begin = [], 0, 0
    for place, character in enumerate(text):
        if character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[begin:place])
            begin = place + 1
    parts.append(text[begin:])
    return [part for part in map(str.strip, parts) if part]
