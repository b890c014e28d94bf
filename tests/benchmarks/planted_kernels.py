"""Kernels that `benchmarks.compile` must refuse, one for each fault, and one that it must not. Not a test by itself: it
is compiled in a process of its own, since Triton's interpreter, which tests run in, has nothing to compile."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from benchmarks.compile_cases import CompileCase
from engine.kernels.triton.launch import launch

_PARENT = os.getpid()


@triton.jit
def _sound(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at) + 1.0)


@triton.jit
def _spilling(x, out, BLOCK: tl.constexpr):
    """One warp keeps 16384 numbers alive, 512 a thread: twice the registers that a thread can have."""
    at = tl.arange(0, BLOCK)
    values = tl.load(x + at)
    tl.store(out + at, values / tl.sum(values))


@triton.jit
def _greedy(x, out, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Four stages of two tiles of 128 x 128 floats are 512 KiB of shared memory."""
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    total = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    for begin in range(0, WIDTH, SIZE):
        a = tl.load(x + rows * WIDTH + begin + columns)
        b = tl.load(x + (begin + rows) * WIDTH + columns)
        total = tl.dot(a, b, total, input_precision="tf32")
    tl.store(out + rows * SIZE + columns, total)


@triton.jit
def _wrong(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at) + tl.arange(0, 2 * BLOCK))


class _Crash:
    """Stands for a kernel that takes the compiler's process down."""

    __name__ = "_crash"

    def is_gluon(self) -> bool:
        return False

    @property
    def arg_names(self) -> list[str]:
        if os.getpid() != _PARENT:
            os._exit(11)
        return ["x"]


def _numbers(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(1 << 14, dtype=dtype), torch.empty(1 << 14, dtype=dtype)


def cases() -> list[CompileCase]:
    return [
        CompileCase("sound", lambda dtype: launch(_sound, (1,), *_numbers(dtype), BLOCK=1024)),
        CompileCase("spilling", lambda dtype: launch(_spilling, (1,), *_numbers(dtype), num_warps=1, BLOCK=16384)),
        CompileCase("greedy", lambda dtype: launch(_greedy, (1,), *_numbers(dtype), num_warps=8, num_stages=4,
                                                   SIZE=128, WIDTH=4096)),
        CompileCase("wrong", lambda dtype: launch(_wrong, (1,), *_numbers(dtype), BLOCK=1024)),
        CompileCase("crash", lambda dtype: launch(_Crash(), (1,), _numbers(dtype)[0])),
    ]  # fmt: skip
