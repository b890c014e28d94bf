"""mbarriers: their phases, and what is an error."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ptx.instructions.mbarrier import Barrier
from tests.ptx.instructions.ordering import ProtocolError
from tests.ptx.programs import SCHEDULES, element, run
from tests.ptx.syntax import PTXError

schedules = pytest.mark.parametrize(("schedule", "seed"), SCHEDULES)
_SHARED = ".extern .shared .align 128 .b8 memory[];"
_BEGIN = element(0, 4, "%rd1") + "mov.b32 %r10, memory; setp.eq.u32 %p1, %r0, 0; setp.lt.u32 %p2, %r0, 32;\n"


def _barrier(expected: int) -> Barrier:
    return Barrier(0, expected, np.zeros((2, 4), np.int64), np.zeros((2, 4), np.int64))


def _run(body: str, out: torch.Tensor, schedule: str = "in order", seed: int = 0) -> None:
    run(_BEGIN + body, out, shared=256, declared=_SHARED, schedule=schedule, seed=seed)


def test_a_phase_ends_with_its_last_arrival_and_the_next_begins() -> None:
    barrier = _barrier(2)
    seen = []
    for _ in range(4):
        barrier.arrive()
        seen.append((barrier.phase, barrier.passed(0), barrier.passed(1)))
    assert seen == [(0, False, True), (1, True, False), (1, True, False), (2, False, True)]


def test_a_phase_waits_for_bytes_too_in_whatever_order_they_are_named() -> None:
    barrier = _barrier(1)
    barrier.expect(-512)  # has come before it was expected
    barrier.expect(1024)
    barrier.arrive()
    assert barrier.phase == 0
    barrier.expect(-512)
    assert barrier.phase == 1


def test_more_arrivals_than_a_phase_waits_for_are_an_error() -> None:
    with pytest.raises(ProtocolError, match="3 arrive"):
        _barrier(2).arrive(3)
    with pytest.raises(ProtocolError, match="made for 0"):
        _barrier(0)
    with pytest.raises(ProtocolError, match="bytes to come"):
        _barrier(1).expect(2**20)


def test_what_arrivals_publish_is_seen_once_their_phase_is_complete() -> None:
    barrier = _barrier(2)
    barrier.released[0, 1] = 7
    barrier.arrive()
    assert not barrier.acquired.any()
    barrier.arrive()
    assert barrier.acquired[0, 1] == 7
    assert not barrier.released.any()


@schedules
def test_a_warp_goes_on_when_the_other_has_arrived(schedule: str, seed: int) -> None:
    """The first warp writes, every lane arrives; the second waits and reads; then the other way, in the next phase."""
    out = torch.zeros(64, dtype=torch.int32)
    body = """
        @%p1 mbarrier.init.shared::cta.b64 [%r10], 32;
        bar.sync 0;
        and.b32 %r11, %r0, 31; mad.lo.s32 %r11, %r11, 4, %r10;
        @!%p2 bra second;
        st.shared.b32 [%r11+128], 5;
        mbarrier.arrive.shared::cta.b64 _, [%r10];
        { .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%r10], 1; @!done bra.uni again; }
        ld.shared.b32 %r12, [%r11+128];
        bra.uni end;
        second:
        { .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%r10], 0; @!done bra.uni again; }
        ld.shared.b32 %r12, [%r11+128];
        add.s32 %r13, %r12, 2; st.shared.b32 [%r11+128], %r13;
        mbarrier.arrive.shared::cta.b64 %rd3, [%r10];
        end:
        st.global.b32 [%rd1], %r12;
    """
    _run(body, out, schedule, seed)
    assert out.tolist() == [7] * 32 + [5] * 32


@schedules
def test_a_token_names_the_phase_of_its_arrival(schedule: str, seed: int) -> None:
    out = torch.zeros(64, dtype=torch.int32)
    body = """
        @%p1 mbarrier.init.shared::cta.b64 [%r10], 64;
        bar.sync 0;
        mbarrier.arrive.shared::cta.b64 %rd3, [%r10];
        { .reg .pred done; again: mbarrier.test_wait.shared::cta.b64 done, [%r10], %rd3; @!done bra.uni again; }
        bar.sync 0;
        @%p1 mbarrier.inval.shared::cta.b64 [%r10];
        st.global.b32 [%rd1], 1;
    """
    _run(body, out, schedule, seed)
    assert out.tolist() == [1] * 64


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("@%p1 mbarrier.arrive.shared::cta.b64 _, [%r10];", "no mbarrier.init"),
        ("mbarrier.init.shared::cta.b64 [%r10], 1;", "64 threads make an mbarrier"),
        ("@%p1 mbarrier.init.shared::cta.b64 [%r10+4], 1;", "at 4 of shared memory"),
        ("@%p1 mbarrier.init.shared::cta.b64 [%r10], 1; @!%p2 mbarrier.arrive.shared::cta.b64 _, [%r10];",
         "warp 1 uses shared memory at 0, which warp 0 wrote, and has not waited"),
        ("@%p1 mbarrier.init.shared::cta.b64 [%r10], 1; bar.sync 0; @%p1 st.shared.b32 [%r10], 0; bar.sync 0;"
         "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r10];", "something else has written"),
        ("@%p1 mbarrier.init.shared::cta.b64 [%r10], 1; bar.sync 0; mbarrier.arrive.shared::cta.b64 _, [%r10];",
         "64 arrive at the mbarrier at 0 of shared memory, whose phase 0 waits for 1"),
        ("@%p1 mbarrier.init.shared::cta.b64 [%r10], 1; bar.sync 0;"
         "mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r10], 0;", "no thread can go on.*waits for 1 of 1 arrivals"),
        ("@%p1 mbarrier.arrive.noComplete.shared::cta.b64 %rd3, [%r10], 1;", "not modelled"),
    ],
)  # fmt: skip
def test_a_broken_rule_is_an_error(body: str, message: str) -> None:
    with pytest.raises(PTXError, match=f"(?s){message}"):
        _run(body, torch.zeros(64, dtype=torch.int32))
