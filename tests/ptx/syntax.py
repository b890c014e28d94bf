"""What PTX text is made of: operands, instructions, variables, kernels, modules, as `tests.ptx.parse` gives them."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field


class PTXError(Exception):
    """The text, or what it does when it runs, is not what PTX allows, or the simulator does not know it."""


FILES = ("pred", "b16", "b32", "b64", "b128")  # register files, by width
_SIZE = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}


def size_of(type_name: str) -> int:
    """Bytes of a fundamental type: "b32" and "f16x2" have 4."""
    if type_name in ("f16x2", "bf16x2"):
        return 4
    return _SIZE[re.sub(r"^\D+", "", type_name)]


@dataclass(frozen=True)
class Register:
    """`file` is one of FILES, `index` the row in it."""

    name: str
    file: str
    index: int


@dataclass(frozen=True)
class Special:
    """A special register such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """An integer, or the bits of a float: `kind` is "int", "f32" or "f64"."""

    value: int
    kind: str

    @property
    def number(self) -> float:
        """Its value as the float that was written, or the integer."""
        if self.kind == "int":
            return self.value
        return struct.unpack("<f" if self.kind == "f32" else "<d",
                             self.value.to_bytes(4 if self.kind == "f32" else 8, "little"))[0]  # fmt: skip


@dataclass(frozen=True)
class Symbol:
    """A label, a variable, a parameter or a function, by its unique name."""

    name: str


@dataclass(frozen=True)
class Address:
    """[base + offset], base a register, a symbol or an immediate; tensor copies also have `coordinates`."""

    base: Operand
    offset: int
    coordinates: tuple[Operand, ...] = ()


@dataclass(frozen=True)
class Vector:
    """{a, b, ...}"""

    elements: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """a|b: two results."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Negated:
    """!p"""

    operand: Operand


@dataclass(frozen=True)
class Sink:
    """_: a result that nobody wants, or the accumulator of nothing."""


Operand = Register | Special | Immediate | Symbol | Address | Vector | Pair | Negated | Sink


@dataclass(frozen=True)
class Instruction:
    """`opcode` is the first word, `modifiers` the others; `predicate` guards it (with `negated`: where it is false).
    `index` is its place in the kernel, `line` and `text` where it was found."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    predicate: Register | None
    negated: bool
    index: int
    line: int
    text: str

    @property
    def type(self) -> str:
        """The last modifier, which is the type of most instructions."""
        return self.modifiers[-1] if self.modifiers else ""

    def has(self, modifier: str) -> bool:
        return modifier in self.modifiers

    def error(self, what: str) -> PTXError:
        return PTXError(f"line {self.line}: {self.text}: {what}")


@dataclass(frozen=True)
class Variable:
    """A parameter or a variable: `space` is "param", "shared", "global", "const" or "local"; `offset` its place among
    those of its space. `size` 0 is an array that the launch gives its size ([]). `data` initialises a global."""

    name: str
    space: str
    offset: int
    size: int
    align: int
    data: bytes = b""


@dataclass
class Kernel:
    """One `.entry`. `registers` counts those of each file; `labels` gives the index of the instruction that follows,
    `tables` the labels that brx.idx chooses from."""

    name: str
    parameters: list[Variable] = field(default_factory=list)
    variables: dict[str, Variable] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FILES, 0))
    threads: int | None = None  # what .reqntid says
    thread_registers: int | None = None  # what .maxnreg says


@dataclass
class Module:
    """`variables` are those outside kernels: shared, global and constant ones."""

    kernels: dict[str, Kernel] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
