"""The data graph: nodes that say what they need and what they establish, and random walks that make the data."""

from forge.condition import Condition, differs, equals, has, missing, one_of
from forge.config import load_graph
from forge.draws import Draws
from forge.graph import Graph, GraphError
from forge.node import Node, NodeKind, Reject, node
from forge.run import RunResult, RunSettings, preview, run_graph
from forge.store import StoreError
from forge.walk import Call, Failure, Walk, take_walk

__all__ = [
    "Call",
    "Condition",
    "Draws",
    "Failure",
    "Graph",
    "GraphError",
    "Node",
    "NodeKind",
    "Reject",
    "RunResult",
    "RunSettings",
    "StoreError",
    "Walk",
    "differs",
    "equals",
    "has",
    "load_graph",
    "missing",
    "node",
    "one_of",
    "preview",
    "run_graph",
    "take_walk",
]
