"""What the tests of single instructions share: a kernel around a few lines of PTX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.ptx.machine import Machine
from tests.ptx.parse import parse

SCHEDULES = [("in order", 0), ("random", 0), ("random", 1)]
MEMORY = ".extern .shared .align 128 .b8 memory[];"  # for `run`, whose `shared` is its size
_TYPES = {torch.float32: "f32", torch.float64: "f64", torch.int32: "b32", torch.int64: "b64", torch.int16: "b16",
          torch.bfloat16: "b16", torch.float16: "b16", torch.uint8: "u8"}  # fmt: skip
_REGISTERS = (".reg .pred %p<20>; .reg .b16 %h<40>; .reg .b32 %r<60>; .reg .f32 %f<40>; .reg .b64 %rd<40>; "
              ".reg .f64 %fd<20>;")  # fmt: skip
# %r0: the thread's number in the grid; %rd0, %rd1, ...: the addresses of its elements in the arguments of 4 bytes
_BEGIN = "mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mad.lo.s32 %r0, %r1, %r2, %r0;\n"


def kernel(body: str, arguments: int, declared: str = "") -> str:
    """PTX of a kernel `k` with so many pointers, `p0` to ...; `declared` stands before it."""
    parameters = ", ".join(f".param .u64 p{place}" for place in range(arguments))
    return (f".version 8.0\n.target sm_90a\n.address_size 64\n{declared}\n"
            f".visible .entry k({parameters})\n{{\n{_REGISTERS}\n{_BEGIN}{body}\nret;\n}}\n")  # fmt: skip


def run(body: str, *arguments: Any, threads: int = 64, grid: Sequence[int] = (1,), shared: int = 0,
        declared: str = "", **options: Any) -> None:  # fmt: skip
    """Runs the lines; `options` are the machine's."""
    Machine(parse(kernel(body, len(arguments), declared)), "k", threads, shared, **options).run(grid, arguments)


def element(argument: int, size: int, register: str) -> str:
    """Sets `register` to the address of this thread's element of `size` bytes."""
    return (f"ld.param.u64 {register}, [p{argument}]; mul.wide.u32 %rd39, %r0, {size}; "
            f"add.s64 {register}, {register}, %rd39;\n")  # fmt: skip


def compute(line: str, result: torch.dtype, *sources: Tensor, extra: str = "") -> Tensor:
    """What the instruction leaves in %d for every element of the sources, which are %a, %b and %c in it."""
    count = len(sources[0])
    threads = -(-count // 32) * 32
    padded = [torch.cat([each, each[:1].expand(threads - count)]).contiguous() for each in sources]
    out = torch.zeros(threads, dtype=result)
    body, names = "", {"f32": "%f", "f64": "%fd", "b32": "%r", "b64": "%rd", "b16": "%h", "u8": "%h"}
    for place, each in enumerate([*padded, out]):
        kind, register = _TYPES[each.dtype], f"%rd{30 + place}"
        value = f"{names[kind]}{10 + place}"
        body += element(place, each.element_size(), register)
        if each is not out:
            body += f"ld.global.{kind} {value}, [{register}];\n"
        line = line.replace("%" + ("abc"[place] if each is not out else "d"), value)
    body += f"{extra}{line}\nst.global.{_TYPES[result]} [%rd{30 + len(padded)}], "
    body += f"{names[_TYPES[result]]}{10 + len(padded)};"
    run(body, *padded, out, threads=threads)
    return out[:count]


def warp(line: str, sources: list[Tensor], threads: int = 32) -> Tensor:
    """What the lines leave in %r20 of each thread; sources of 32 bits are in %r10, %r11, ..."""
    out = torch.zeros(threads, dtype=torch.int32)
    body = ""
    for place, _ in enumerate(sources):
        body += element(place, 4, "%rd1") + f"ld.global.b32 %r{10 + place}, [%rd1];\n"
    body += line + element(len(sources), 4, "%rd1") + "st.global.b32 [%rd1], %r20;"
    run(body, *sources, out, threads=threads, shared=4096, declared=MEMORY)
    return out
