"""What a machine can do, in a handful of figures: the only thing the planner knows of hardware.

Each figure says where it is from: "vendor" (a data sheet), "assumed" (typical, to be replaced by one's own
measurement), "given" (by the user) or "unknown".
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec

from engine.config import load_config
from engine.errors import ConfigError, nearest

FIGURES = {  # name: (unit, what it is)
    "peak_tflops": ("TFLOP/s", "dense bf16 matmul peak of a rank"),
    "memory_gb": ("GB", "memory of a rank (1 GB = 1e9 bytes)"),
    "intra_gbps": ("GB/s", "what a rank sends to its own node, one direction"),
    "inter_gbps": ("GB/s", "what a rank sends to other nodes, one direction"),
    "ranks_per_node": ("", "ranks of a node"),
    "achieved_fraction": ("", "share of the peak that a training step's own arithmetic reaches"),
}


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one rank's hardware; 0 is a figure that nobody gave.

    Without `peak_tflops`, or without a bandwidth that the mesh needs, no time is estimated; without `memory_gb` what is
    left for the KV cache is not. `sources` says of each figure where it is from. Raises ConfigError for a negative
    figure, a fraction above 1, and fewer than one rank per node.
    """

    name: str = ""
    peak_tflops: float = 0.0
    memory_gb: float = 0.0
    intra_gbps: float = 0.0
    inter_gbps: float = 0.0
    ranks_per_node: int = 8
    achieved_fraction: float = 0.4
    sources: dict[str, str] = {}

    def __post_init__(self) -> None:
        for figure in FIGURES:
            value = getattr(self, figure)
            if not 0 <= value < float("inf"):
                raise ConfigError(f"Machine.{figure} is {value}; it must be 0 (unknown) or more, and finite")
        if self.ranks_per_node < 1:
            raise ConfigError(f"Machine.ranks_per_node is {self.ranks_per_node}; it must be at least 1")
        if not 0.0 < self.achieved_fraction <= 1.0:
            raise ConfigError(
                f"Machine.achieved_fraction is {self.achieved_fraction}; it is a share of the peak, above 0 and at "
                "most 1"
            )

    def source(self, figure: str) -> str:
        """Where a figure is from: "vendor", "assumed", "given" or "unknown"."""
        return "unknown" if not getattr(self, figure) else self.sources.get(figure, "given")

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gb * 1e9)

    @property
    def flops(self) -> float:
        """FLOP/s that a step is expected to reach: peak_tflops * 1e12 * achieved_fraction."""
        return self.peak_tflops * 1e12 * self.achieved_fraction


_DATA_SHEET = {"peak_tflops": "vendor", "memory_gb": "vendor", "intra_gbps": "vendor"}
_NODE = {"inter_gbps": "assumed", "ranks_per_node": "assumed", "achieved_fraction": "assumed"}

# A data sheet's NVLink figure counts both directions; half of it is here. Between nodes: one 400 Gb/s adapter a GPU.
MACHINES = {
    "h200": Machine(
        name="h200",
        peak_tflops=989.0,
        memory_gb=141.0,
        intra_gbps=450.0,
        inter_gbps=50.0,
        sources=_DATA_SHEET | _NODE,
    ),
    "b200": Machine(
        name="b200",
        peak_tflops=2250.0,
        memory_gb=180.0,
        intra_gbps=900.0,
        inter_gbps=50.0,
        sources=_DATA_SHEET | _NODE,
    ),
    # CPUs differ too much for a figure of ours: give peak, memory and bandwidths as options.
    "cpu": Machine(name="cpu", ranks_per_node=1, sources={"ranks_per_node": "assumed", "achieved_fraction": "assumed"}),
}


def load_machine(name: str, **given: float | None) -> Machine:
    """A machine by name, or by the path of a TOML file with Machine's keys; figures in `given` (not None) replace its.

    Raises ConfigError for an unknown name (with the nearest known one) and a figure that cannot be.
    """
    if name in MACHINES:
        machine = MACHINES[name]
    elif name.endswith(".toml"):
        machine = load_config(Machine, name)
        machine = msgspec.structs.replace(machine, name=machine.name or Path(name).stem)
    else:
        known = list(MACHINES)
        raise ConfigError(
            f'there is no machine "{name}"{nearest(name, known)}; give {", ".join(known)} or a FILE.toml with the '
            f"keys {', '.join(FIGURES)}"
        )
    figures: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if not figures:
        return machine
    return msgspec.structs.replace(machine, **figures, sources=machine.sources | dict.fromkeys(figures, "given"))


_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12} | {
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40
}  # fmt: skip


def parse_bytes(text: str) -> int:
    """`180GB` (1e9), `64GiB` (2^30) or a plain number of bytes, as bytes. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise ConfigError(f'"{text}" is no amount of memory; write it like 180GB, 64GiB or 68719476736')
    return int(float(match[1]) * _UNITS[match[2]])
