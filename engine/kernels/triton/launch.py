"""How every Triton kernel is launched: on the GPU, in the interpreter, or given to who asked for launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
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

    `signature` gives each argument's type by name ("*bf16" is a pointer to bfloat16, "constexpr" a constant,
    "tensordesc<bf16[64,64],..>" how the copy engine takes such boxes of a tensor); `constants` the values of constants;
    `divisible` the arguments that 16 divides.
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

    @property
    def gluon(self) -> bool:
        """Whether the kernel is written in Gluon, for one kind of GPU."""
        return bool(self.kernel.is_gluon())


# (kernel, grid, arguments in the order of the kernel's parameters): runs it, or does something else with it
Runner = Callable[[Launch, tuple[int, ...], tuple[Any, ...]], None]

_runner: Runner | None = None
_absent_gpu = (132, 9)  # multiprocessors and major compute capability where there is no GPU: those of an H200


@contextmanager
def running(runner: Runner, processors: int = 132, major: int = 9) -> Iterator[None]:
    """Launches inside this block go to `runner`; ops take CPU tensors, and launch what they would on a GPU of so many
    multiprocessors and this major compute capability, tiles and all. Not under the interpreter."""
    global _runner, _absent_gpu
    before, gpu_before = _runner, _absent_gpu
    _runner, _absent_gpu = runner, (processors, major)
    try:
        with triton_without_gpu():
            yield
    finally:
        _runner, _absent_gpu = before, gpu_before


@contextmanager
def collecting(processors: int = 132, major: int = 9) -> Iterator[list[Launch]]:
    """Launches inside this block are noted down and not run, as `running` has it; results stay uninitialised."""
    launches: list[Launch] = []
    with running(lambda launch, grid, arguments: launches.append(launch), processors, major):
        yield launches


def gpu_of(device: torch.device) -> tuple[int, int]:
    """Multiprocessors and major compute capability of a device; where it is no GPU, of the one that `running` is for,
    or an H200's."""
    return _present_gpu(device) if device.type == "cuda" else _absent_gpu


def current_gpu() -> tuple[int, int]:
    """`gpu_of` the current device."""
    return _absent_gpu if not torch.cuda.is_available() else _present_gpu(torch.device("cuda"))


@cache
def _present_gpu(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.major


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, num_stages: int = 2, **constants: Any
) -> None:
    """Runs `kernel` on `grid` programs; nothing happens where one of its sides is 0.

    `arguments` are tensors, numbers and tensor descriptors in the order of the kernel's parameters, `constants` its
    `tl.constexpr` ones. The kernel is Triton's or Gluon's.
    Multiplications and additions are never contracted: a kernel says `tl.fma` where it wants one, so that two kernels
    that write the same arithmetic do the same arithmetic.
    """
    if 0 in grid:
        return
    if _runner is not None:
        _runner(_noted(kernel, arguments, constants, num_warps, num_stages), grid, arguments)
        return
    kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=False, **constants)


def aligned(x: Tensor) -> Tensor:
    """`x` [rows, columns], or a copy of it where it lies so that loads of its rows would be narrower than usual: how
    wide they are decides how a row's elements are dealt to threads, and so the order of its sum, which must not depend
    on where a tensor happens to lie. Rows of other than multiples of 16 are loaded element by element wherever they
    lie; of the others, Triton's compiler wants the address in bytes and the stride in elements to be multiples of 16.
    """
    lies_well = x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0
    return x if lies_well or x.shape[1] % 16 else x.clone(memory_format=torch.contiguous_format)


def _noted(
    kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], num_warps: int, num_stages: int
) -> Launch:
    """As Triton's own launcher would specialise it: None and 1 are constants, and divisibility by 16 is known."""
    signature, values, divisible = {}, dict(constants), set()
    unspecialised = {each.name for each in getattr(kernel, "params", ()) if each.do_not_specialize}
    for name, value in zip(kernel.arg_names, arguments, strict=False):
        one = isinstance(value, int) and not isinstance(value, bool) and value == 1
        if value is None or (one and name not in unspecialised):
            values[name] = value
        elif isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                divisible.add(name)
        elif hasattr(value, "block_shape"):
            box = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}[{box}],{value.layout!r}>"
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and name not in unspecialised:
                divisible.add(name)
        else:
            signature[name] = "fp32"
    ordered = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    return Launch(kernel, ordered, values, frozenset(divisible), num_warps, num_stages)
