"""wgmma on hand-written PTX: what a product in flight does not allow. Compiled ones are in tests/ptx/kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ptx.machine import Machine
from tests.ptx.parse import parse
from tests.ptx.syntax import PTXError

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
         descriptor: int = _DESCRIPTOR, strict: bool = True) -> torch.Tensor:  # fmt: skip
    """[128]: each thread's first sum of a product of 64 x 16 and 16 x 8 ones."""
    out = torch.zeros(128)
    text = _SMALL.format(before=before, between=between, after=after, descriptor=descriptor)
    Machine(parse(text), "k", 128, 4096, completion=completion, strict=strict).run((1,), [out])
    return out


@pytest.mark.parametrize("completion", ["early", "late"])
def test_a_product_without_swizzle(completion: str) -> None:
    assert torch.equal(_run(completion=completion), torch.full((128,), 16.0))


@pytest.mark.parametrize("completion", ["early", "late"])
def test_sums_that_were_waited_for_need_no_other_fence(completion: str) -> None:
    again = "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r10, %r11, %r12, %r13}, %rd1, %rd2, %p1, 1, 1, 0, 0;"
    found = _run(between=f"wgmma.commit_group.sync.aligned; {_WAIT} {again}", completion=completion)
    assert torch.equal(found, torch.full((128,), 32.0))


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
        ({"between": f"wgmma.commit_group.sync.aligned; {_WAIT} mov.b32 %r10, 0; wgmma.mma_async.sync.aligned"
                     ".m64n8k16.f32.f16.f16 {%r10, %r11, %r12, %r13}, %rd1, %rd2, %p1, 1, 1, 0, 0;"},
         "after the last wgmma.fence"),
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


@pytest.mark.parametrize("strict", [True, False])
def test_registers_of_a_that_are_written_in_flight_are_seen_by_a_late_product(strict: bool) -> None:
    """Ones in A become zeros; a machine that is not strict takes them as they were."""
    between = f"""{_WAIT} mov.b32 %r14, %r3; mov.b32 %r15, %r3; mov.b32 %r16, %r3; mov.b32 %r17, %r3;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%r10, %r11, %r12, %r13}}, {{%r14, %r15, %r16, %r17}}, %rd2,
            %p1, 1, 1, 0;
        wgmma.commit_group.sync.aligned;
        mov.b32 %r14, 0; mov.b32 %r15, 0; mov.b32 %r16, 0; mov.b32 %r17, 0;"""
    found = _run(between=f"wgmma.commit_group.sync.aligned; {between}", strict=strict)
    assert torch.equal(found, torch.full((128,), 16.0 if strict else 32.0))
