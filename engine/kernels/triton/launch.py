"""How every Triton kernel is launched: on the GPU, in the interpreter, or into a list for the compiler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.kernels.op import triton_without_gpu

_TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv", torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8",
    torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A kernel as the compiler needs it: no tensor, no value but those that the code depends on.

    `signature` gives each argument's type by name ("*bf16" is a pointer to bfloat16, "constexpr" a constant);
    `constants` the values of constants; `divisible` the arguments that 16 divides.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: frozenset[str]
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        return self.kernel.__name__


_collected: list[Launch] | None = None


@contextmanager
def collecting() -> Iterator[list[Launch]]:
    """Launches inside this block are noted down and not run; ops take CPU tensors, whose results stay uninitialised.

    So what is compiled ahead of time is what would be launched, tiles and all. Not under the interpreter.
    """
    global _collected
    before, _collected = _collected, []
    try:
        with triton_without_gpu():
            yield _collected
    finally:
        _collected = before


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, num_stages: int = 2, **constants: Any
) -> None:
    """Runs `kernel` on `grid` programs; nothing happens where one of its sides is 0.

    `arguments` are tensors and numbers in the order of the kernel's parameters, `constants` its `tl.constexpr` ones.
    Multiplications and additions are never contracted: a kernel says `tl.fma` where it wants one, so that two kernels
    that write the same arithmetic do the same arithmetic.
    """
    if 0 in grid:
        return
    if _collected is not None:
        _collected.append(_noted(kernel, arguments, constants, num_warps, num_stages))
        return
    kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=False, **constants)


def _noted(
    kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], num_warps: int, num_stages: int
) -> Launch:
    """As Triton's own launcher would specialise it: None and 1 are constants, and divisibility by 16 is known."""
    signature, values, divisible = {}, dict(constants), set()
    for name, value in zip(kernel.arg_names, arguments, strict=False):
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and value == 1):
            values[name] = value
        elif isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                divisible.add(name)
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                divisible.add(name)
        else:
            signature[name] = "fp32"
    ordered = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    return Launch(kernel, ordered, values, frozenset(divisible), num_warps, num_stages)
