"""Kernels for Hopper (sm_90) alone, in Gluon: their warps are given parts by hand, where plain Triton deals them."""

from __future__ import annotations

from importlib.util import find_spec

_OLDEST = (3, 6)  # the oldest Triton whose Gluon these are written for


def missing() -> str:
    """Why they cannot run here, Triton and a GPU being there; empty where they can."""
    import triton

    from engine.kernels.triton.launch import current_gpu

    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version < _OLDEST or find_spec("triton.experimental.gluon") is None:
        return f"Triton {triton.__version__} has no Gluon that it is written for; install 3.6 or newer"
    if triton.knobs.runtime.interpret:
        return "Triton's interpreter does not run Gluon"
    major = current_gpu()[1]
    return "" if major == 9 else f"it is for compute capability 9; this GPU has {major}"
