"""The machine: control flow, predicates, barriers, schedules, and what it reports."""

import pytest
import torch

from tests.ptx.programs import SCHEDULES, element, run
from tests.ptx.scheduler import Deadlock
from tests.ptx.syntax import PTXError

schedules = pytest.mark.parametrize(("schedule", "seed"), SCHEDULES)


def test_vectors_are_added_and_what_is_not_there_is_left_alone():
    a, b, c = torch.randn(200), torch.randn(200), torch.zeros(201)
    body = element(0, 4, "%rd1") + element(1, 4, "%rd2") + element(2, 4, "%rd3") + """
        setp.lt.s32 %p1, %r0, 200;
        @%p1 ld.global.b32 {%r10}, [%rd1 + 0];
        @%p1 ld.global.b32 {%r11}, [%rd2 + 0];
        add.rn.f32 %r12, %r10, %r11;
        @%p1 st.global.b32 [%rd3 + 0], {%r12};
    """  # fmt: skip
    run(body, a, b, c, grid=(4,))
    assert torch.equal(c[:200], a + b)
    assert c[200] == 0


@schedules
def test_threads_that_part_meet_again(schedule, seed):
    """Each thread goes round its own number of times; the shuffle after the loop needs all lanes."""
    out = torch.zeros(96, dtype=torch.int32)
    body = element(0, 4, "%rd1") + """
        mov.b32 %r10, 0;
        and.b32 %r11, %r0, 7;
        loop:
        setp.ge.u32 %p1, %r10, %r11;
        @%p1 bra done;
        add.s32 %r10, %r10, 1;
        bra.uni loop;
        done:
        shfl.sync.idx.b32 %r12, %r10, 5, 31, -1;
        mad.lo.s32 %r12, %r12, 100, %r10;
        st.global.b32 [%rd1], %r12;
    """  # fmt: skip
    run(body, out, threads=96, schedule=schedule, seed=seed)
    assert torch.equal(out, 500 + torch.arange(96, dtype=torch.int32) % 8)


def test_threads_that_return_early_leave_the_others():
    out = torch.zeros(64, dtype=torch.int32)
    run(element(0, 4, "%rd1") + "setp.gt.u32 %p1, %r0, 40; @%p1 ret; st.global.b32 [%rd1], %r0;", out)
    assert torch.equal(out, torch.where(torch.arange(64) > 40, 0, torch.arange(64)).int())


@schedules
def test_labels_and_registers_of_an_inner_scope_are_its_own(schedule, seed):
    out = torch.zeros(64, dtype=torch.int32)
    body = element(0, 4, "%rd1") + """
        mov.b32 %r10, 3;
        { .reg .pred more; .reg .b32 %r10; mov.b32 %r10, 0;
        again: add.s32 %r10, %r10, 1; setp.lt.u32 more, %r10, 4; @more bra again; mov.b32 %r11, %r10; }
        { .reg .pred more; again: add.s32 %r10, %r10, 1; setp.lt.u32 more, %r10, 9; @!more bra out; bra again; out: }
        mad.lo.s32 %r10, %r11, 10, %r10; st.global.b32 [%rd1], %r10;
    """  # fmt: skip
    run(body, out, schedule=schedule, seed=seed)
    assert torch.equal(out, torch.full((64,), 49, dtype=torch.int32))


REVERSED = """
    mov.b32 %r10, memory; mov.u32 %r11, %tid.x; shl.b32 %r12, %r11, 2; add.s32 %r13, %r10, %r12;
    st.shared.b32 [%r13], %r0;
    BARRIER
    sub.s32 %r14, 508, %r12; add.s32 %r14, %r10, %r14; ld.shared.b32 %r15, [%r14];
    st.global.b32 [%rd1], %r15;
"""
MEMORY = ".extern .shared .align 16 .b8 memory[];"


@schedules
def test_what_is_stored_before_a_barrier_is_there_after_it(schedule, seed):
    out = torch.zeros(256, dtype=torch.int32)
    body = element(0, 4, "%rd1") + REVERSED.replace("BARRIER", "bar.sync 0;")
    run(body, out, threads=128, grid=(2,), shared=512, declared=MEMORY, schedule=schedule, seed=seed)
    assert torch.equal(out, torch.cat([torch.arange(127, -1, -1), torch.arange(255, 127, -1)]).int())


@schedules
def test_a_missing_barrier_is_an_error(schedule, seed):
    body = element(0, 4, "%rd1") + REVERSED.replace("BARRIER", "")
    with pytest.raises(PTXError, match=r"warp \d .* shared memory at .* has not waited for (warp \d|that)"):
        run(body, torch.zeros(128), threads=128, shared=512, declared=MEMORY, schedule=schedule, seed=seed)


@schedules
def test_named_barriers_have_their_own_threads(schedule, seed):
    """Warps 0 and 1 hand over to 2 and 3: one pair arrives, the other waits."""
    out = torch.zeros(128, dtype=torch.int32)
    body = element(0, 4, "%rd1") + """
        mov.b32 %r10, memory; shl.b32 %r12, %r0, 2; add.s32 %r13, %r10, %r12;
        setp.ge.u32 %p1, %r0, 64;
        @%p1 bra second;
        st.shared.b32 [%r13], %r0;
        bar.arrive 3, 128;
        bra.uni end;
        second:
        bar.sync 3, 128;
        ld.shared.b32 %r15, [%r13 + -256];
        st.global.b32 [%rd1], %r15;
        end:
    """  # fmt: skip
    run(body, out, threads=128, shared=512, declared=MEMORY, schedule=schedule, seed=seed)
    assert torch.equal(out[64:], torch.arange(64, dtype=torch.int32))


def test_barriers_by_a_register_part_the_warps():
    out = torch.zeros(128, dtype=torch.int32)
    body = element(0, 4, "%rd1") + "shr.u32 %r10, %r0, 6; add.s32 %r10, %r10, 1; barrier.sync.aligned %r10, 64;"
    run(body + "st.global.b32 [%rd1], %r10;", out, threads=128, schedule="random")
    assert torch.equal(out, 1 + torch.arange(128, dtype=torch.int32) // 64)


@schedules
def test_a_deadlock_names_who_waits_for_what(schedule, seed):
    body = "setp.lt.u32 %p1, %r0, 32; @%p1 bra other; bar.sync 0; bra.uni end; other: bar.sync 2, 64; end:"
    with pytest.raises(Deadlock, match=r"(?s)threads 0 to 31.*barrier 2.*threads 32 to 63.*barrier 0 \(32 of 64"):
        run(body, schedule=schedule, seed=seed)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("frobnicate.b32 %r3, %r4;", "line 9: frobnicate.b32 %r3, %r4: this opcode is not known"),
        ("cvt.rna.tf32.f32 %r3, %r4;", "this form is not known"),
        ("mov.b32 %r3, nothing;", "nothing is no variable"),
        ("ld.global.b32 %r3, [%rd5];", r"line 9: ld.global.b32 %r3, \[%rd5\]: global address 0xffffffffffffffff"),
        ("mov.b32 %r3, 0; ld.shared.b32 %r3, [%r3];", "shared address 0x0 is in none of"),
    ],
)  # fmt: skip
def test_errors_name_the_line(line, error):
    with pytest.raises(PTXError, match=error):
        run(line, torch.zeros(4))


@pytest.mark.parametrize("offset", [-4, 16, 2])
def test_what_lies_beside_a_tensor_is_not_touched(offset):
    memory = torch.zeros(12)
    body = "ld.param.u64 %rd1, [p0]; ld.global.b32 %r5, [%rd1 + (at)];"
    with pytest.raises(PTXError, match=f"{memory.data_ptr() + 16 + offset:#x}"):
        run(body.replace("(at)", str(offset)), memory[4:8])
    run(body.replace("(at)", "12"), memory[4:8])
