"""The machine: control flow, barriers, predicates, schedules, and what it reports."""

import torch

from tests.ptx.machine import Machine
from tests.ptx.parse import parse


def kernel(body: str, parameters: str = ".param .u64 a, .param .u64 b", shared: str = "") -> str:
    registers = ".reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<30>; .reg .b64 %rd<20>;"
    return f".version 8.0\n.target sm_90a\n.address_size 64\n{shared}\n.entry k({parameters})\n{{\n{registers}\n{body}\nret;\n}}\n"


def run(body, *arguments, threads=64, grid=(1,), shared=0, declared="", **options):
    parameters = ", ".join(f".param .u64 p{place}" for place in range(len(arguments)))
    module = parse(kernel(body, parameters, declared))
    Machine(module, "k", threads, shared, **options).run(grid, arguments)


AT = """
    mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x; mad.lo.s32 %r1, %r2, %r3, %r1;
    ld.param.u64 %rd1, [p0]; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2;
"""
SCHEDULES = [("in order", 0), ("random", 0), ("random", 1)]


def test_vectors_are_added():
    a, b, c = torch.randn(200), torch.randn(200), torch.zeros(200)
    run(AT + """
        ld.param.u64 %rd4, [p1]; add.s64 %rd4, %rd4, %rd2; ld.param.u64 %rd5, [p2]; add.s64 %rd5, %rd5, %rd2;
        setp.lt.s32 %p1, %r1, 200;
        @%p1 ld.global.b32 {%r10}, [%rd3 + 0];
        @%p1 ld.global.b32 {%r11}, [%rd4 + 0];
        add.rn.f32 %r12, %r10, %r11;
        @%p1 st.global.b32 [%rd5 + 0], {%r12};
    """, a, b, c, grid=(4,))  # fmt: skip
    assert torch.equal(c, a + b)
