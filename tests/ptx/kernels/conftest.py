"""These tests need kernels that the compiler takes: they run where TRITON_INTERPRET is 0 (see test_kernels.py)."""

import os

from engine.kernels.op import triton_missing, triton_without_gpu

with triton_without_gpu():
    _missing = bool(triton_missing())
collect_ignore_glob = ["test_*.py"] if os.environ.get("TRITON_INTERPRET") == "1" or _missing else []
