"""One op at one shape, with what there is to compare it with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    """`work` is operations where `kind` is "flops" and bytes moved where it is "bytes"."""

    op: str
    shape: str
    kind: str
    work: float
    ours: Callable[[], object]
    torch: Callable[[], object] | None
    backends: dict[str, Callable[[], object]] = field(default_factory=dict)  # torch's, where it has several
    peers: dict[str, Callable[[], object]] = field(default_factory=dict)  # of other packages
