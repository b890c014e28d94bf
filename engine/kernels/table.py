"""Which backend serves which op here, and why the others do not: what `python -m engine ops` prints."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules

import torch

import engine.kernels
from engine.errors import ConfigError
from engine.kernels.op import OPS


@dataclass(frozen=True)
class OpRow:
    """One backend of one op. `why_not` says why it is not the chosen one; it is empty for the one that is."""

    op: str
    backend: str
    chosen: bool
    exact: bool  # keeps the contract of row invariance
    proven: bool  # has run on the hardware it is for
    why_not: str


def rows(dtype: torch.dtype | None = None, device: str = "cpu") -> list[OpRow]:
    """A row per op and backend for a model of `dtype` (None: of one that the kernels have) on `device` ("cpu" or
    "cuda"), ops by name, backends in the order they are tried."""
    for module in iter_modules(engine.kernels.__path__):
        import_module(f"engine.kernels.{module.name}")
    table = []
    for name, op in sorted(OPS.items()):
        try:
            chosen = op.chosen(dtype, device).name
        except ConfigError:  # nothing can run: every row then says why
            chosen = ""
        for backend in op.backends:
            reason = backend.refusal(dtype, device) or (
                f"{chosen} comes first" if chosen else "not the backend asked for"
            )
            is_chosen = backend.name == chosen
            why_not = "" if is_chosen else reason
            table.append(OpRow(name, backend.name, is_chosen, backend.exact, backend.proven, why_not))
    return table
