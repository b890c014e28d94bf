"""One public op, its backends in sight: which are there, which was chosen, and why the others were not."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from engine.errors import ConfigError

try:
    from engine import _C
except ImportError as error:  # no compiler at install: the torch definitions serve, and `engine ops` says so
    _C = None  # type: ignore[assignment]
    _C_MISSING = f"the C++ extension is not built ({error}); run `make setup` on a machine with g++"
else:
    _C_MISSING = ""
try:
    from engine import _cuda
except ImportError as error:  # no nvcc at install: Triton's kernels serve a GPU alone
    _cuda = None  # type: ignore[assignment]
    _CUDA_MISSING = f"the CUDA extension is not built ({error}); run `make setup` on a machine with nvcc"
else:
    _CUDA_MISSING = ""

OPS: dict[str, Op] = {}
_forced: str | None = None
# Triton's interpreter runs kernels on CPU tensors; it looks at this variable when a kernel is defined, so it holds for
# the whole process.
_triton_without_gpu = os.environ.get("TRITON_INTERPRET") == "1"


def extension() -> ModuleType:
    """The compiled extension. Raises ConfigError when it is not built."""
    if _C is None:
        raise ConfigError(_C_MISSING)
    return _C


def cpu_missing() -> str:
    """Why C++ kernels cannot run here; empty when they can."""
    return _C_MISSING


def cuda_extension() -> ModuleType:
    """The compiled CUDA extension. Raises ConfigError when it is not built."""
    if _cuda is None:
        raise ConfigError(_CUDA_MISSING)
    return _cuda


def cuda_not_built() -> str:
    """Why there is no CUDA extension; empty when there is one, with or without a GPU."""
    return _CUDA_MISSING


def cuda_missing() -> str:
    """Why CUDA kernels cannot run here, beside Triton's; empty when they can."""
    return _CUDA_MISSING or triton_missing()


def cpu_layout() -> bool:
    """Whether weights and pages that are made now are for the C++ kernels, in these kernels' layout: they serve the
    default device, and no other backend is asked for. Otherwise matrices are dense."""
    return not cpu_missing() and _forced in (None, "cpu") and torch.get_default_device().type in ("cpu", "meta")


def cpu_backend(functions: dict[str, Callable[..., Any]], dtypes: Collection[torch.dtype] = ()) -> Backend:
    """The backend of C++ kernels."""
    return Backend("cpu", functions, cpu_missing, dtypes=dtypes, devices=("cpu",))


def triton_missing() -> str:
    """Why Triton kernels cannot run here; empty when they can."""
    if not _triton_installed():
        return "Triton is not installed (pip install triton); CUDA builds of torch bring it along"
    if _triton_without_gpu or torch.cuda.is_available():
        return ""
    return "torch sees no CUDA device"


@cache
def _triton_installed() -> bool:
    return find_spec("triton") is not None


@contextmanager
def triton_without_gpu() -> Iterator[None]:
    """Triton's backends take CPU tensors inside this block: for who notes launches down instead of running them."""
    global _triton_without_gpu
    before, _triton_without_gpu = _triton_without_gpu, True
    try:
        yield
    finally:
        _triton_without_gpu = before


def lazily(module: str, function: str) -> Callable[..., Any]:
    """The function of that module, which is imported when it is first called: Triton takes a second to import, and who
    runs on a CPU has no use for it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(module), function)(*args, **kwargs)

    return call


def triton_backend(module: str, *functions: str, dtypes: Collection[torch.dtype] = ()) -> Backend:
    """The backend whose functions are those of engine.kernels.triton.`module`, by the same names."""
    where = f"engine.kernels.triton.{module}"
    every = {function: lazily(where, function) for function in functions}
    return Backend("triton", every, triton_missing, dtypes=dtypes, devices=("cuda",), proven=False)


def cuda_backend(module: str, *functions: str, dtypes: Collection[torch.dtype] = ()) -> Backend:
    """The backend whose functions are those of engine.kernels.cuda.`module`, which also says what it `missing()`."""
    where = f"engine.kernels.cuda.{module}"
    every = {function: lazily(where, function) for function in functions}

    def why_not() -> str:
        return cuda_missing() or str(lazily(where, "missing")())

    return Backend("cuda", every, why_not, dtypes=dtypes, devices=("cuda",), proven=False)


def hopper_backend(module: str, *functions: str, dtypes: Collection[torch.dtype] = ()) -> Backend:
    """The backend whose functions are those of engine.kernels.hopper.`module`: Gluon's, for compute capability 9."""
    every = {function: lazily(f"engine.kernels.hopper.{module}", function) for function in functions}

    def why_not() -> str:
        return triton_missing() or str(lazily("engine.kernels.hopper", "missing")())

    return Backend("hopper", every, why_not, dtypes=dtypes, devices=("cuda",), proven=False)


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    `why_not()` is empty where the backend can run; `dtypes` are those it computes in, all if empty; `devices` those
    whose tensors it takes. `exact` says that it keeps the contract of row invariance, `proven` that it has run on the
    hardware it is for: until then interpreter and compiler alone vouch for it. `functions` are what the op's public
    functions call, by name ("forward", "backward", ...).
    """

    name: str
    functions: dict[str, Callable[..., Any]]
    why_not: Callable[[], str] = lambda: ""
    exact: bool = True
    dtypes: Collection[torch.dtype] = ()
    devices: Collection[str] = ("cpu", "cuda")
    proven: bool = True

    def refusal(self, dtype: torch.dtype | None = None, device: str = "cpu") -> str:
        """Why it cannot compute in `dtype` (None: any of its own) on tensors of `device` here; empty where it can."""
        on_cpu = self.name in ("triton", "hopper") and _triton_without_gpu
        if device not in self.devices and not on_cpu:
            return f"it takes {' and '.join(self.devices)} tensors, not {device} ones"
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

    def chosen(self, dtype: torch.dtype | None = None, device: str = "cpu") -> Backend:
        """The first backend that can compute in `dtype` on tensors of `device` ("cpu" or "cuda") here, or the one
        `use_backend` asks for.

        Raises ConfigError when none can.
        """
        reasons, asked_for = [], self._asked_for()
        for backend in self.backends:
            if asked_for is not None and backend.name != asked_for:
                reasons.append(f"{backend.name}: not the backend asked for ({asked_for})")
            elif reason := backend.refusal(dtype, device):
                reasons.append(f"{backend.name}: {reason}")
            else:
                return backend
        raise ConfigError(f"op {self.name} has no backend that can run here: {'; '.join(reasons)}")

    def _asked_for(self) -> str | None:
        """What `use_backend` names; CUDA's and Hopper's kernels are few and work beside Triton's, which serve the other
        ops."""
        few = _forced in ("cuda", "hopper") and all(backend.name != _forced for backend in self.backends)
        return "triton" if few else _forced

    def serving(self, tensor: Tensor) -> Backend:
        """The backend for tensors of this dtype and device."""
        return self.chosen(tensor.dtype, tensor.device.type)

    def __getitem__(self, key: tuple[str, Tensor]) -> Callable[..., Any]:
        """op["forward", x]: the function of the backend that serves tensors like x."""
        function, tensor = key
        return self.serving(tensor).functions[function]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Every op runs on the backend called `name` inside this block ("cuda", "hopper": or on Triton's, where it has no
    such backend); the choice before it comes back after."""
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
