"""A warp-specialised product as Gluon compiles it (TMA in and out, mbarriers, wgmma), right and with one fault each."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tests.ptx.instructions.tensor_map import expanded
from tests.ptx.machine import Machine
from tests.ptx.parse import parse
from tests.ptx.syntax import Module, PTXError

_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
_STAGES = 2
_TILES = 5
_MODES = [("in order", "early", 0), ("in order", "late", 0), ("random", "early", 1), ("random", "late", 2)]


@gluon.jit
def _produce(a, b, ring_a, ring_b, full, free, tiles, STAGES: gl.constexpr, FAULT: gl.constexpr):
    size: gl.constexpr = a.block_type.nbytes + b.block_type.nbytes
    for i in range(tiles):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        if FAULT != "does not wait for a free stage":
            mbarrier.wait(free.index(stage), phase ^ 1)
        mbarrier.expect(full.index(stage), size + 16 if FAULT == "expects too many bytes" else size)
        _load(a, [gl.program_id(0) * 128, i * 64], full.index(stage), ring_a.index(stage))
        _load(b, [i * 64, 0], full.index(stage), ring_b.index(stage))


@gluon.jit
def _consume(
    c, ring_a, ring_b, full, free, tiles, out, PART: gl.constexpr, STAGES: gl.constexpr, N: gl.constexpr,
    FAULT: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    total = gl.zeros([64, N], gl.float32, layout)
    for i in range(tiles):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        if FAULT != "does not wait for a full stage":
            mbarrier.wait(full.index(stage), phase)
        total = warpgroup_mma(ring_a.index(stage).slice(PART * 64, 64), ring_b.index(stage), total, is_async=True)
        if FAULT != "frees a stage that is multiplied with":
            total = warpgroup_mma_wait(0, deps=[total])
        if FAULT == "frees a stage that is multiplied with":
            mbarrier.arrive(free.index(stage), count=1)
            total = warpgroup_mma_wait(0, deps=[total])
        else:
            mbarrier.arrive(free.index(stage), count=2 if FAULT == "arrives twice" else 1)
    out.store(total.to(c.dtype))
    fence_async_shared()
    _store(c, [gl.program_id(0) * 128 + PART * 64, 0], out)
    if FAULT == "overwrites what is stored":
        out.store(gl.zeros([64, N], c.dtype, layout))
    tma.store_wait(0)


@gluon.jit
def _product(a, b, c, tiles, STAGES: gl.constexpr, FAULT: gl.constexpr):
    N: gl.constexpr = b.block_type.shape[1]
    ring_a = gl.allocate_shared_memory(a.dtype, [STAGES, 128, 64], a.layout)
    ring_b = gl.allocate_shared_memory(b.dtype, [STAGES, 64, N], b.layout)
    out = gl.allocate_shared_memory(c.dtype, [2, 64, N], c.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    gl.warp_specialize(
        [
            (_consume, (c, ring_a, ring_b, full, free, tiles, out.index(0), 0, STAGES, N, FAULT)),
            (_consume, (c, ring_a, ring_b, full, free, tiles, out.index(1), 1, STAGES, N, FAULT)),
            (_produce, (a, b, ring_a, ring_b, full, free, tiles, STAGES, FAULT)),
        ],
        [4, 1],
        [240, 24],
    )


def _descriptors(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> list[Any]:
    columns = b.shape[1]
    boxes = [(a, [128, 64]), (b, [64, columns]), (c, [64, columns])]
    return [
        TensorDescriptor.from_tensor(tensor, box, gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16))
        for tensor, box in boxes
    ]


@cache
def _compiled(columns: int, fault: str) -> tuple[Module, Any]:
    tensors = [torch.zeros(size, dtype=torch.bfloat16) for size in ((128, 64), (64, columns), (64, columns))]
    described = _descriptors(*tensors)
    types = [f"tensordesc<bf16{list(each.block_shape)},{each.layout!r}>" for each in described]
    signature = dict(zip("abc", types, strict=True), tiles="i32", STAGES="constexpr", FAULT="constexpr")
    source = GluonASTSource(_product, signature, {"STAGES": _STAGES, "FAULT": fault})
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "enable_fp_fusion": False}
    )
    return parse(compiled.asm["ptx"]), compiled.metadata


def _run(columns: int, schedule: str, completion: str, seed: int, fault: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel makes of two random matrices, and their product in float64."""
    module, metadata = _compiled(columns, fault)
    generator = torch.Generator().manual_seed(0)
    rows, depth = 200, 64 * _TILES - 16  # neither is a whole number of tiles
    a = torch.randn(rows, depth, generator=generator).bfloat16()
    b = torch.randn(depth, columns, generator=generator).bfloat16()
    c = torch.full((rows, columns), float("nan"), dtype=torch.bfloat16)
    arguments = expanded(_descriptors(a, b, c), metadata.tensordesc_meta)
    machine = Machine(module, "_product", 32 * metadata.num_warps, metadata.shared, schedule, completion, seed)
    machine.run((2,), [*arguments, _TILES, None, None])
    return c, a.double() @ b.double()


@pytest.mark.parametrize("columns", [64, 128])
def test_a_product_is_right_whatever_the_order(columns: int) -> None:
    found = [_run(columns, *mode) for mode in _MODES]
    for result, expected in found:
        assert torch.equal(result, found[0][0])
        torch.testing.assert_close(result.double(), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("does not wait for a free stage", "has not waited|whose phase 0 waits for 0"),
        ("does not wait for a full stage", "has not waited|no thread can go on"),
        ("frees a stage that is multiplied with", "has not waited"),
        ("arrives twice", "has not waited|no thread can go on"),
        ("overwrites what is stored", "has not waited"),
        ("expects too many bytes", "waits for 0 of 1 arrivals and 16 bytes"),
    ],
)
def test_a_fault_is_found_whatever_the_order(fault: str, message: str) -> None:
    for mode in _MODES:
        with pytest.raises(PTXError, match=message):
            _run(64, *mode, fault=fault)
