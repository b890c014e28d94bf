"""Tests of Triton kernels in the simulator instead of the interpreter:

    TRITON_INTERPRET=0 python -m pytest -p tests.ptx.plugin tests/kernels/triton/test_swiglu.py

Kernels are then what the compiler makes of them for Hopper, in bfloat16 too. SIMULATED names schedule and completion
("random late"; default "in order early"). Slow: every kernel and every shape of a test is compiled first.
"""

from __future__ import annotations

import os
from contextlib import ExitStack

import pytest

_running = ExitStack()


def pytest_configure(config: pytest.Config) -> None:
    from engine.kernels.triton.launch import running
    from tests.ptx.launches import CAPABILITY, PROCESSORS, Simulator

    *schedule, completion = os.environ.get("SIMULATED", "in order early").split()
    _running.enter_context(running(Simulator(" ".join(schedule), completion), PROCESSORS, CAPABILITY // 10))


def pytest_unconfigure(config: pytest.Config) -> None:
    _running.close()
