"""As in tests/ptx/kernels: these run where TRITON_INTERPRET is 0 (tests/ptx/test_kernels.py)."""

from tests.ptx.kernels.conftest import collect_ignore_glob

__all__ = ["collect_ignore_glob"]
