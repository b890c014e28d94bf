"""Products as Triton compiles them: every type and layout of operands that tl.dot takes to mma.sync or wgmma."""

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
from tests.ptx.parse import parse
from tests.ptx.syntax import Module

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8e4nv": torch.float8_e4m3fn}
_STRICT = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)  # see Machine
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
        machine = Machine(module, "_product", 32 * warps, metadata.shared, schedule, completion, seed, strict=_STRICT)
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
