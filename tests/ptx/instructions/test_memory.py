"""Loads and stores of every width, and matrices of 8 x 8."""

import pytest
import torch

from tests.ptx.programs import MEMORY, element, run, warp
from tests.ptx.syntax import PTXError

GENERATOR = torch.Generator().manual_seed(0)


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
