"""A node: a function from struct to struct that declares what it needs and what it establishes.

    class Operands(msgspec.Struct):
        left: int
        right: int

    class Answer(msgspec.Struct):
        answer: int

    @node(version=1, preconditions=[missing("answer")])
    def add(operands: Operands) -> Answer:
        return Answer(operands.left + operands.right)

A node reads the fields of its input struct and writes those of its output struct. Each input field without a default is
a precondition `has(field)`, each output field a postcondition `has(field)`; the decorator adds to them.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from hashlib import sha256
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

import msgspec

from engine import ConfigError
from forge.condition import Condition, has, merge
from forge.draws import Draws

if TYPE_CHECKING:
    from forge.graph import Graph

S = TypeVar("S", bound=msgspec.Struct)


class Reject(Exception):
    """Raised by a node to drop the row it works on; the row is kept in the store with this reason."""


class NoParameters(msgspec.Struct, frozen=True):
    """The parameters of a node that takes none."""


class NoInput(msgspec.Struct, frozen=True):
    """The input of a node that reads no field."""


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean "x"?)' for the closest known name, or an empty string."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f' (did you mean "{close[0]}"?)' if close else ""


def parse_struct(kind: type[S], data: Mapping[str, Any], where: str) -> S:
    """`data` as a struct of `kind`. Raises ConfigError for an unknown key (naming the nearest) or a wrong type."""
    known = [f.encode_name for f in msgspec.structs.fields(kind)]
    for key in data:
        if key not in known:
            knows = f"it knows {', '.join(known)}" if known else "it takes none"
            raise ConfigError(f'{where} has no "{key}"{nearest(key, known)}; {knows}')
    try:
        return msgspec.convert(dict(data), kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from None


@dataclass(frozen=True, eq=False)
class Node:
    """One node of a graph: a kind of node bound to a name and to parameters.

    `reads` and `writes` give the type of each field. `preconditions` holds one condition per field that must hold
    before the node; `effects` one per field that the node writes, or deletes (`missing`), and holds after it. `call`
    takes the record and a stream of draws and returns the fields written, or an awaitable of them; it is None for a
    nested `graph`, which the walk enters instead.
    """

    name: str
    version: int
    reads: Mapping[str, Any]
    writes: Mapping[str, Any]
    preconditions: Mapping[str, Condition]
    effects: Mapping[str, Condition]
    parameters: msgspec.Struct = field(default_factory=NoParameters)
    call: Callable[[Mapping[str, Any], Draws], dict[str, Any] | Awaitable[dict[str, Any]]] | None = None
    graph: Graph | None = None

    @cached_property
    def parameters_hash(self) -> str:
        """12 hexadecimal digits of the SHA-256 of the parameters; of a nested graph, its version."""
        if self.graph is not None:
            return self.graph.version
        return sha256(msgspec.json.encode(self.parameters)).hexdigest()[:12]


class NodeKind:
    """A decorated function: `bind` gives a node of it, calling it runs the bare function."""

    def __init__(
        self,
        function: Callable[..., Any],
        version: int,
        preconditions: Iterable[Condition],
        postconditions: Iterable[Condition],
    ) -> None:
        self.function, self.version, self.name = function, version, getattr(function, "__name__", "node")
        self.__doc__ = function.__doc__
        where = f'node "{self.name}"'
        self.input, self.output, self.parameters = _signature(function, where)
        self._input_name = next((n for n in _arguments(function) if n not in ("parameters", "draws")), None)
        self._takes = frozenset(_arguments(function)) & {"parameters", "draws"}
        self.reads, self.writes = _field_types(self.input), _field_types(self.output)
        required = [f.name for f in msgspec.structs.fields(self.input) if f.required]
        try:
            self.preconditions = merge([*map(has, required), *preconditions])
            self.effects = merge([*map(has, self.writes), *postconditions])
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        for name, condition in self.effects.items():
            if name not in self.writes and not condition.implies(~has(name)):
                raise ConfigError(
                    f'{where} promises {condition} but writes no "{name}"{nearest(name, self.writes)}; '
                    f"add the field to {self.output.__name__}"
                )

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.function(*arguments, **named)

    def bind(self, name: str = "", parameters: Mapping[str, Any] | msgspec.Struct | None = None) -> Node:
        """A node of this kind. `name` defaults to the function's; `parameters` is the struct, or a mapping of its
        fields. Raises ConfigError for parameters that do not fit."""
        name = name or self.name
        if not isinstance(parameters, msgspec.Struct):
            parameters = parse_struct(self.parameters, parameters or {}, f'parameters of node "{name}"')
        elif type(parameters) is not self.parameters:
            raise ConfigError(f'node "{name}" takes {self.parameters.__name__}, not {type(parameters).__name__}')
        call = self._caller(parameters)
        return Node(name, self.version, self.reads, self.writes, self.preconditions, self.effects, parameters, call)

    def _caller(self, parameters: msgspec.Struct) -> Callable[[Mapping[str, Any], Draws], Any]:
        function, reads, input_name = self.function, list(self.reads), self._input_name
        named: dict[str, Any] = {"parameters": parameters} if "parameters" in self._takes else {}
        wants_draws = "draws" in self._takes

        def call(record: Mapping[str, Any], draws: Draws) -> Any:
            arguments = dict(named)
            if input_name is not None:
                arguments[input_name] = msgspec.convert({f: record[f] for f in reads if f in record}, self.input)
            if wants_draws:
                arguments["draws"] = draws
            result = function(**arguments)
            return self._awaited(result) if inspect.isawaitable(result) else self._checked(result)

        return call

    async def _awaited(self, result: Awaitable[Any]) -> dict[str, Any]:
        return self._checked(await result)

    def _checked(self, result: Any) -> dict[str, Any]:
        """The fields written, as plain JSON types. Raises msgspec.ValidationError where they break their types."""
        if not isinstance(result, self.output):
            raise msgspec.ValidationError(f"returned {type(result).__name__}, not {self.output.__name__}")
        written = {f: msgspec.to_builtins(getattr(result, f)) for f in self.writes}
        msgspec.convert(written, self.output)  # a Struct does not check types when it is made
        return written


def node(
    *, version: int = 1, preconditions: Iterable[Condition] = (), postconditions: Iterable[Condition] = ()
) -> Callable[[Callable[..., Any]], NodeKind]:
    """Makes a function into a kind of node.

    The function takes at most one struct of fields (any name), and, if it names them, `parameters` (a struct) and
    `draws` (`Draws`, the only source of randomness it may use); it returns a struct of fields, or is `async` and does.
    Raise `version` whenever the function's results change: it is part of every record's provenance. Raises ConfigError
    for a signature or conditions that cannot be used.
    """
    return lambda function: NodeKind(function, version, preconditions, postconditions)


def _arguments(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def _signature(
    function: Callable[..., Any], where: str
) -> tuple[type[msgspec.Struct], type[msgspec.Struct], type[msgspec.Struct]]:
    """The structs a function takes as input, returns, and takes as parameters."""
    hints = get_type_hints(function)
    inputs = [name for name in _arguments(function) if name not in ("parameters", "draws")]
    if len(inputs) > 1:
        raise ConfigError(f"{where} takes {', '.join(inputs)}; put the fields it reads into one struct")

    def struct(name: str, what: str) -> type[msgspec.Struct]:
        kind = hints.get(name)
        if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
            raise ConfigError(f"{where}: {what} must be annotated with a msgspec.Struct, not {kind!r}")
        return kind

    takes_parameters = "parameters" in _arguments(function)
    return (
        struct(inputs[0], f'the argument "{inputs[0]}"') if inputs else NoInput,
        struct("return", "what it returns"),
        struct("parameters", 'the argument "parameters"') if takes_parameters else NoParameters,
    )


def _field_types(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {f.name: f.type for f in msgspec.structs.fields(kind)}
