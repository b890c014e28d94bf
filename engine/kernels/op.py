"""One public op, its backends in sight: which are there, which was chosen, and why the others were not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from engine.errors import ConfigError

try:
    from engine import _C
except ImportError as error:  # no compiler at install: the torch definitions serve, and `engine ops` says so
    _C = None  # type: ignore[assignment]
    _C_MISSING = f"the C++ extension is not built ({error}); run `make setup` on a machine with g++"
else:
    _C_MISSING = ""

OPS: dict[str, Op] = {}
_forced: str | None = None


def extension() -> ModuleType:
    """The compiled extension. Raises ConfigError when it is not built."""
    if _C is None:
        raise ConfigError(_C_MISSING)
    return _C


def cpu_missing() -> str:
    """Why C++ kernels cannot run here; empty when they can."""
    return _C_MISSING


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    `why_not()` is empty where the backend can run; `dtypes` are those it computes in, all if empty. `exact` says that
    it keeps the contract of row invariance. `functions` are what the op's public functions call, by name ("forward",
    "backward", ...).
    """

    name: str
    functions: dict[str, Callable[..., Any]]
    why_not: Callable[[], str] = lambda: ""
    exact: bool = True
    dtypes: Collection[torch.dtype] = ()

    def refusal(self, dtype: torch.dtype | None = None) -> str:
        """Why it cannot compute in `dtype` (None: in any of its own) here; empty where it can."""
        if reason := self.why_not():
            return reason
        if dtype is None or not self.dtypes or dtype in self.dtypes:
            return ""
        own = " and ".join(str(each).removeprefix("torch.") for each in self.dtypes)
        return f"it computes in {own}, not in {str(dtype).removeprefix('torch.')}"


class Op:
    """A name and its backends, tried in order."""

    def __init__(self, name: str, backends: list[Backend]) -> None:
        self.name = name
        self.backends = backends
        OPS[name] = self

    def chosen(self, dtype: torch.dtype | None = None) -> Backend:
        """The first backend that can compute in `dtype` here, or the one `use_backend` asks for.

        Raises ConfigError when none can.
        """
        reasons = []
        for backend in self.backends:
            if _forced is not None and backend.name != _forced:
                reasons.append(f"{backend.name}: not the backend asked for ({_forced})")
            elif reason := backend.refusal(dtype):
                reasons.append(f"{backend.name}: {reason}")
            else:
                return backend
        raise ConfigError(f"op {self.name} has no backend that can run here: {'; '.join(reasons)}")

    def __getitem__(self, key: str | tuple[str, torch.dtype]) -> Callable[..., Any]:
        """op["forward", dtype]: the function of the backend that computes in `dtype`; op["forward"] where there is but
        one dtype."""
        function, dtype = (key, None) if isinstance(key, str) else key
        return self.chosen(dtype).functions[function]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Every op runs on the backend called `name` inside this block; the choice before it comes back after."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """C++ kernels run the code path called `name` ("generic", "avx2", "avx512", "avx512_bf16", "amx")."""
    before = extension().isa()
    extension().set_isa(name)
    try:
        yield
    finally:
        extension().set_isa(before)


def isas() -> list[str]:
    """The code paths this machine can run, weakest first."""
    every = ["generic", "avx2", "avx512", "avx512_bf16", "amx"]
    return every[: every.index(extension().best_isa()) + 1]
