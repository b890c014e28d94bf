"""A graph and the settings of its run, from a TOML file."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec

from engine import ConfigError, load_config
from forge.condition import has
from forge.graph import Graph
from forge.node import Node, NodeKind, nearest, parse_struct
from forge.run import RunSettings


class NodeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One node: a decorated function as "module:function", or a nested graph as a path beside this file."""

    uses: str = ""
    graph: str = ""
    parameters: dict[str, Any] = {}


class GraphConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A graph file. `given` and `goal` name fields that must be there; the keys of a run are those of RunSettings.

    A nested graph's file needs no run keys; those it has are not used.
    """

    name: str
    goal: list[str]
    nodes: dict[str, dict[str, Any]]
    given: list[str] = []
    weights: dict[str, dict[str, float]] = {}
    output: str = ""
    seed: int = 0
    records: int = 1000
    fields: tuple[str, ...] = ()
    unique: tuple[str, ...] = ()
    concurrency: int = 32
    retries: int = 0
    max_rejected_in_a_row: int = 1000


def load_graph(path: str | Path, overrides: list[str] = ()) -> tuple[Graph, RunSettings]:  # type: ignore[assignment]
    """The graph and run settings of a file; each override is `key.inner=value`, as for every configuration.

    Raises ConfigError, which GraphError is, for what cannot be used, naming the nearest known key, module or function.
    """
    config, graph = _load(Path(path), overrides, ())
    keys = {name: getattr(config, name) for name in RunSettings.__struct_fields__}
    keys["output"] = config.output or f"runs/{config.name}"
    return graph, RunSettings(**keys)


def _load(path: Path, overrides: list[str], outer: tuple[Path, ...]) -> tuple[GraphConfig, Graph]:
    if path.resolve() in outer:
        raise ConfigError(f"{path} nests itself; a graph cannot be one of its own nodes")
    config = load_config(GraphConfig, path, overrides)
    nodes = [
        _load_node(name, data, path, (*outer, path.resolve()), list(config.nodes))
        for name, data in config.nodes.items()
    ]
    graph = Graph(config.name, nodes, goal=map(has, config.goal), given=map(has, config.given), weights=config.weights)
    return config, graph


def _load_node(name: str, data: dict[str, Any], path: Path, outer: tuple[Path, ...], names: list[str]) -> Node:
    where = f'{path}: node "{name}"'
    config = parse_struct(NodeConfig, data, where)
    if bool(config.uses) == bool(config.graph):
        others = [other for other in names if other != name]
        raise ConfigError(
            f'{where}{nearest(name, others)} {"has both" if config.uses else "has neither"} "uses" '
            f'{"and" if config.uses else "nor"} "graph"; give it the one that says what it is'
        )
    if config.graph:
        if config.parameters:
            raise ConfigError(f"{where} is a graph, which takes no parameters; set them in {config.graph}")
        return _load(path.parent / config.graph, [], outer)[1].as_node(name)
    return _find_kind(config.uses, where).bind(name, config.parameters)


def _find_kind(uses: str, where: str) -> NodeKind:
    module_name, colon, function = uses.partition(":")
    if not colon or not module_name or not function:
        raise ConfigError(f'{where} uses "{uses}"; write it as "module:function"')
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f'{where} uses "{uses}", but there is no module "{error.name}"') from None
    kinds = [key for key, value in vars(module).items() if isinstance(value, NodeKind)]
    kind = getattr(module, function, None)
    if not isinstance(kind, NodeKind):
        raise ConfigError(
            f'{where} uses "{uses}", but {module_name} has no node "{function}"{nearest(function, kinds)}; it has '
            f"{', '.join(kinds) or 'none'}"
        )
    return kind
