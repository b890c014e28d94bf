"""Loads and stores of every width, values that move among lanes, and matrices of 8 x 8."""

import pytest
import torch

from tests.ptx.programs import element, run
from tests.ptx.syntax import PTXError

MEMORY = ".extern .shared .align 128 .b8 memory[];"
GENERATOR = torch.Generator().manual_seed(0)


def warp(line: str, sources: list[torch.Tensor], threads: int = 32) -> torch.Tensor:
    """What the lines leave in %r20 of each thread; sources of 32 bits are in %r10, %r11, ..."""
    out = torch.zeros(threads, dtype=torch.int32)
    body = ""
    for place, _ in enumerate(sources):
        body += element(place, 4, "%rd1") + f"ld.global.b32 %r{10 + place}, [%rd1];\n"
    body += line + element(len(sources), 4, "%rd1") + "st.global.b32 [%rd1], %r20;"
    run(body, *sources, out, threads=threads, shared=4096, declared=MEMORY)
    return out


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("bits", [8, 16, 32, 64])
def test_vectors_go_through_every_space(bits, count):
    """Global to shared to global, and back by generic addresses."""
    size = bits // 8 * count
    data = torch.randint(0, 256, (64 * size,), generator=GENERATOR, dtype=torch.uint8)
    out = torch.zeros_like(data)
    kind = {8: "%h", 16: "%h", 32: "%r", 64: "%rd"}[bits]
    registers = [f"{kind}{10 + place}" for place in range(count)]
    vector, form = f"{{{', '.join(registers)}}}", f".v{count}" if count > 1 else ""
    operand = vector if count > 1 else registers[0]
    body = element(0, size, "%rd1") + element(1, size, "%rd2") + f"""
        mov.b64 %rd3, memory; cvt.u32.u64 %r5, %rd3; mad.lo.s32 %r5, %r0, {size}, %r5;
        ld.global{form}.b{bits} {operand}, [%rd1];
        st.shared{form}.b{bits} [%r5], {operand};
        cvt.u64.u32 %rd4, %r5; cvta.shared.u64 %rd4, %rd4;
        ld{form}.b{bits} {operand}, [%rd4];
        st{form}.u{bits} [%rd2], {operand};
    """  # fmt: skip
    run(body, data, out, shared=64 * size, declared=MEMORY)
    assert torch.equal(out, data)


def test_narrow_loads_extend_by_their_type():
    data = torch.tensor([-5, 100] * 32, dtype=torch.int8).view(torch.uint8)
    out = torch.zeros(64, dtype=torch.int64)
    for kind, expected in (("s8", [-5, 100]), ("u8", [251, 100])):
        body = element(0, 1, "%rd1") + element(1, 8, "%rd2") + f"ld.global.{kind} %rd5, [%rd1];"
        run(body + "st.global.b64 [%rd2], %rd5;", data, out)
        assert torch.equal(out, torch.tensor(expected * 32))


def test_parameters_are_of_their_own_width():
    out = torch.zeros(32)
    body = element(0, 4, "%rd1") + "ld.param.s32 %rd5, [p1]; ld.param.b32 %r6, [p1+4]; cvt.rn.f32.s64 %f1, %rd5;"
    body += "mov.b32 %f2, %r6; mul.rn.f32 %f1, %f1, %f2; st.global.f32 [%rd1], %f1;"
    packed = (-3 % 2**32).to_bytes(4, "little") + torch.tensor([0.5]).numpy().tobytes()
    run(body, out, packed, threads=32)
    assert (out == -1.5).all()


@pytest.mark.parametrize("line", ["st.global.b32 [%rd1 + 4], %r0;", "st.global.v2.b32 [%rd1], {%r0, %r0};"])
def test_a_store_beyond_the_end_is_an_error(line):
    with pytest.raises(PTXError, match=r"line 9: st\.global.* ends beyond|in none of|no multiple"):
        run(element(0, 4, "%rd1") + line, torch.zeros(64))


def test_an_access_that_is_not_aligned_is_an_error():
    with pytest.raises(PTXError, match="no multiple of 8"):
        run("ld.param.u64 %rd1, [p0]; ld.global.b64 %rd2, [%rd1 + 4];", torch.zeros(64))


@pytest.mark.parametrize(
    ("line", "source"),
    [
        ("shfl.sync.bfly.b32 %r20, %r10, 5, 31, -1;", lambda lane: lane ^ 5),
        ("shfl.sync.up.b32 %r20, %r10, 3, 0, -1;", lambda lane: lane - 3 if lane >= 3 else lane),
        ("shfl.sync.down.b32 %r20, %r10, 3, 31, -1;", lambda lane: lane + 3 if lane + 3 < 32 else lane),
        ("shfl.sync.idx.b32 %r20, %r10, 9, 31, -1;", lambda lane: 9),
        ("shfl.sync.idx.b32 %r20, %r10, %r11, 31, -1;", lambda lane: lane * 7 % 32),
        ("shfl.sync.bfly.b32 %r20, %r10, 4, 6175, -1;", lambda lane: lane ^ 4),  # segments of 8: 0x181F
        ("shfl.sync.up.b32 %r20, %r10, 2, 6144, -1;", lambda lane: lane - 2 if lane % 8 >= 2 else lane),
        ("shfl.sync.idx.b32 %r20, %r10, 3, 6175, -1;", lambda lane: lane // 8 * 8 + 3),
    ],
)
def test_shuffles(line, source):
    values = torch.randint(0, 1 << 30, (64,), generator=GENERATOR, dtype=torch.int32)
    index = torch.tensor([lane * 7 % 32 for lane in range(32)] * 2, dtype=torch.int32)
    expected = [values[at // 32 * 32 + source(at % 32)] for at in range(64)]
    assert warp(line, [values, index], 64).tolist() == [int(each) for each in expected]


def test_a_shuffle_says_whether_its_lane_is_there():
    found = warp("shfl.sync.down.b32 %r9|%p1, %r10, 30, 31, -1; selp.b32 %r20, 1, 0, %p1;", [torch.zeros(32)])
    assert found.tolist() == [1, 1] + [0] * 30


def test_votes_matches_and_reductions_are_of_a_warp():
    values = torch.randint(-9, 9, (64,), generator=GENERATOR, dtype=torch.int32)
    warps = values.view(2, 32)

    def bits(mask: torch.Tensor) -> list[int]:
        return [sum(1 << lane for lane in range(32) if row[lane]) for row in mask for _ in range(32)]

    def found(line: str) -> list[int]:
        return [each % 2**32 for each in warp("setp.gt.s32 %p1, %r10, 0; " + line, [values], 64).tolist()]

    assert found("vote.sync.ballot.b32 %r20, %p1, -1;") == bits(warps > 0)
    assert found("vote.sync.any.pred %p2, %p1, -1; selp.b32 %r20, 1, 0, %p2;") == [1] * 64
    assert found("vote.sync.all.pred %p2, %p1, -1; selp.b32 %r20, 1, 0, %p2;") == [0] * 64
    same = [(row == value).unsqueeze(0) for row in warps for value in row]
    assert found("match.any.sync.b32 %r20, %r10, -1;") == [bits(each)[0] for each in same]
    for name, expected in (("add", warps.sum(1)), ("min", warps.amin(1)), ("max", warps.amax(1))):
        line = f"redux.sync.{name}.s32 %r20, %r10, -1;"
        assert found(line) == (expected.long() % 2**32).repeat_interleave(32).tolist()


def test_one_lane_is_elected_where_only_some_are_there():
    line = """
        and.b32 %r11, %r0, 31; mov.b32 %r20, 7; setp.lt.u32 %p1, %r11, 20; @%p1 bra end;
        elect.sync %r12|%p2, 0xFFF00000; selp.b32 %r20, 1, 0, %p2;
        end:
    """
    assert warp(line, [torch.zeros(64)], 64).tolist() == ([7] * 20 + [1] + [0] * 11) * 2


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_of_8_by_8_are_loaded_as_fragments(count, transposed):
    """Lane l has row l / 4, columns l % 4 * 2 and the next, of each matrix or of its transpose."""
    data = torch.randint(0, 2**15, (4, 8, 8), generator=GENERATOR, dtype=torch.int16)
    words = data.view(torch.int32).reshape(4, 32)
    form = ".trans" if transposed else ""
    registers = ", ".join(f"%r{30 + place}" for place in range(count))
    for place in range(count):
        line = "mov.b32 %r9, memory; shl.b32 %r8, %r0, 2; add.s32 %r7, %r9, %r8;"
        line += "".join(f"st.shared.b32 [%r7 + {128 * each}], %r{10 + each};" for each in range(4))
        line += f"bar.sync 0; shl.b32 %r8, %r0, 4; add.s32 %r7, %r9, %r8; and.b32 %r7, %r7, {128 * count - 1};"
        line += f"ldmatrix.sync.aligned.m8n8.x{count}{form}.shared.b16 {{{registers}}}, [%r7];"
        line += f"mov.b32 %r20, %r{30 + place};"
        found = warp(line, [each.contiguous() for each in words]).view(torch.int16).view(8, 8)
        assert torch.equal(found, data[place].T if transposed else data[place])


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_that_are_stored_are_those_that_are_loaded(transposed):
    values = [torch.randint(0, 2**30, (32,), generator=GENERATOR, dtype=torch.int32) for _ in range(4)]
    form = ".trans" if transposed else ""
    for place in range(4):
        line = f"""
            mov.b32 %r9, memory; shl.b32 %r8, %r0, 4; add.s32 %r7, %r9, %r8;
            stmatrix.sync.aligned.m8n8.x4{form}.shared.b16 [%r7], {{%r10, %r11, %r12, %r13}};
            bar.warp.sync -1;
            ldmatrix.sync.aligned.m8n8.x4{form}.shared.b16 {{%r30, %r31, %r32, %r33}}, [%r7];
            mov.b32 %r20, %r{30 + place};
        """
        assert torch.equal(warp(line, values), values[place])
