"""Products as Triton compiles them: every type and layout of operands that tl.dot takes to mma.sync or wgmma; and what a
product in flight does not allow."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.ptx.machine import Machine
from tests.ptx.parse import Module, PTXError, parse

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8e4nv": torch.float8_e4m3fn}
_FENCES = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)  # older ones leave some out
_MODES = [("in order", "early", 0), ("in order", "late", 0), ("random", "early", 1), ("random", "late", 2)]
_DEPTH = 128


@triton.jit
def _product(a, b, c, depth, ACROSS_A: tl.constexpr, ACROSS_B: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
             K: tl.constexpr, IN_REGISTERS: tl.constexpr):  # fmt: skip
    row, column, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros([M, N], tl.float32)
    for begin in range(0, depth, K):
        if ACROSS_A:
            left = tl.load(a + (k[None, :] + begin) * M + row[:, None])
        else:
            left = tl.load(a + row[:, None] * depth + k[None, :] + begin)
        if ACROSS_B:
            right = tl.load(b + column[None, :] * depth + k[:, None] + begin)
        else:
            right = tl.load(b + (k[:, None] + begin) * N + column[None, :])
        if IN_REGISTERS:
            left = left + left
        total = tl.dot(left, right, total)
    tl.store(c + row[:, None] * N + column[None, :], total)


@cache
def _compiled(kind: str, across: tuple[bool, bool], shape: tuple[int, int, int], warps: int,
              in_registers: bool) -> tuple[str, Module, Any]:  # fmt: skip
    constants = dict(zip(("ACROSS_A", "ACROSS_B", "M", "N", "K", "IN_REGISTERS"), (*across, *shape, in_registers),
                         strict=True))  # fmt: skip
    signature = {"a": f"*{kind}", "b": f"*{kind}", "c": "*fp32", "depth": "i32"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(_product, signature, constants, {(place,): [["tt.divisibility", 16]] for place in range(4)})
    options = {"num_warps": warps, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return compiled.asm["ptx"], parse(compiled.asm["ptx"]), compiled.metadata


@pytest.mark.parametrize(
    ("kind", "across", "shape", "warps", "in_registers", "instruction"),
    [
        ("bf16", (False, False), (64, 128, 64), 4, False, "wgmma.*m64n128k16.f32.bf16"),
        ("bf16", (True, True), (64, 64, 64), 4, False, "wgmma.*m64n64k16.f32.bf16"),
        ("fp16", (False, True), (128, 256, 64), 8, False, "wgmma.*m64n256k16.f32.f16"),
        ("fp16", (True, False), (64, 16, 16), 4, False, "wgmma.*m64n16k16.f32.f16"),  # swizzles of 32 bytes and 128
        ("bf16", (False, False), (64, 32, 32), 4, True, r"wgmma.*m64n32k16.f32.bf16.bf16 \{.*\}, \{"),
        ("fp8e4nv", (False, False), (64, 64, 64), 4, False, "wgmma.*m64n64k32.f32.e4m3"),
        ("fp32", (False, False), (64, 64, 32), 4, False, "wgmma.*m64n64k8.f32.tf32"),
        ("bf16", (False, False), (32, 32, 32), 4, False, "mma.sync.*m16n8k16.row.col.f32.bf16"),
        ("fp16", (True, True), (16, 64, 32), 2, False, "mma.sync.*m16n8k16.row.col.f32.f16"),
        ("fp32", (False, True), (16, 32, 32), 4, False, "mma.sync.*m16n8k8.row.col.f32.tf32"),
    ],
)
def test_a_compiled_product_is_right_whatever_the_order(
    kind: str, across: tuple[bool, bool], shape: tuple[int, int, int], warps: int, in_registers: bool, instruction: str
) -> None:
    text, module, metadata = _compiled(kind, across, shape, warps, in_registers)
    assert re.search(instruction, text)
    rows, columns, _ = shape
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rows, _DEPTH, generator=generator).to(_DTYPES[kind])
    b = torch.randn(_DEPTH, columns, generator=generator).to(_DTYPES[kind])
    given = [each.T.contiguous() if turned else each for each, turned in zip((a, b), across, strict=True)]
    expected = _exact(a) @ _exact(b) * (2 if in_registers else 1)
    results = []
    for schedule, completion, seed in _MODES:
        c = torch.full((rows, columns), float("nan"))
        machine = Machine(module, "_product", 32 * warps, metadata.shared, schedule, completion, seed, fences=_FENCES)
        machine.run((1,), [*given, c, _DEPTH, *[None] * (len(machine.kernel.parameters) - 4)])
        torch.testing.assert_close(c.double(), expected, rtol=1e-5, atol=1e-5)
        results.append(c)
    assert all(torch.equal(result, results[0]) for result in results)


def _exact(matrix: torch.Tensor) -> torch.Tensor:
    """As the tensor cores take it: float32 without its 13 lowest bits."""
    if matrix.dtype == torch.float32:
        kept = matrix.numpy().view(np.uint32) & np.uint32(0xFFFFE000)
        return torch.from_numpy(kept.view(np.float32)).double()
    return matrix.double()


_SMALL = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 128 .b8 memory[];
.visible .entry k(.param .u64 p0)
{{
    .reg .pred %p<4>; .reg .b32 %r<20>; .reg .b64 %rd<9>;
    mov.u32 %r0, %tid.x;
    mov.b32 %r1, memory; mad.lo.s32 %r2, %r0, 16, %r1;
    mov.b32 %r3, 0x3C003C00;
    st.shared.v4.b32 [%r2], {{%r3, %r3, %r3, %r3}};
    {before}
    mov.b64 %rd1, {descriptor}; mov.b64 %rd2, {descriptor};
    mov.b32 %r10, 0; mov.b32 %r11, 0; mov.b32 %r12, 0; mov.b32 %r13, 0; mov.pred %p1, 1;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%r10, %r11, %r12, %r13}}, %rd1, %rd2, %p1, 1, 1, 0, 0;
    {between}
    wgmma.commit_group.sync.aligned;
    {after}
    ld.param.u64 %rd3, [p0]; mul.wide.u32 %rd4, %r0, 4; add.s64 %rd3, %rd3, %rd4;
    st.global.b32 [%rd3], %r10;
    ret;
}}
"""
_READY = "fence.proxy.async.shared::cta; bar.sync 0;"
_DESCRIPTOR = 16 << 32 | 8 << 16  # 8 rows of 16 bytes: 128 bytes a group of rows below, as many to the right; at 0
_WAIT = "wgmma.wait_group.sync.aligned 0;"


def _run(before: str = _READY, between: str = "", after: str = _WAIT, completion: str = "late",
         descriptor: int = _DESCRIPTOR) -> torch.Tensor:  # fmt: skip
    """[128]: each thread's first sum of a product of 64 x 16 and 16 x 8 ones."""
    out = torch.zeros(128)
    text = _SMALL.format(before=before, between=between, after=after, descriptor=descriptor)
    Machine(parse(text), "k", 128, 4096, completion=completion).run((1,), [out])
    return out


@pytest.mark.parametrize("completion", ["early", "late"])
def test_a_product_without_swizzle(completion: str) -> None:
    assert torch.equal(_run(completion=completion), torch.full((128,), 16.0))


def test_sums_are_nan_until_they_are_waited_for() -> None:
    copied = _run(after=f"mov.b32 %r14, %r10; {_WAIT} mov.b32 %r10, %r14;")
    assert copied.isnan().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"before": "bar.sync 0;"}, "without a fence.proxy.async"),
        ({"before": "fence.proxy.async.shared::cta;"}, "has not waited"),
        ({"between": "st.shared.b32 [%r2], 0;"}, "writes shared memory at 0 and has not waited for warp 0"),
        ({"after": ""}, "ended before its products"),
        ({"between": "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r11, %r10, %r12, %r13}, "
                     "%rd1, %rd2, %p1, 1, 1, 0, 0;"}, "some of this one's registers of sums"),
        ({"between": "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r14, %r15, %r16, %r17}, "
                     "{%r10, %r11, %r12, %r13}, %rd2, %p1, 1, 1, 0;"}, "%r10 is read"),
        ({"descriptor": _DESCRIPTOR | 0x3000}, "of 4096 bytes of shared memory"),
        ({"between": "wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8 {%r14, %r15, %r16, %r17}, %rd1, %rd2, %p1;"},
         "not modelled"),
        ({"before": f"{_READY} setp.lt.u32 %p2, %r0, 64; @%p2 bra early; nanosleep.u32 20; ret; early:"},
         "for warpgroup 0"),
    ],
)  # fmt: skip
def test_a_broken_rule_is_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PTXError, match=message):
        _run(**changes)
