"""Instructions that compute, each against a plain definition at random and at awkward values."""

import math

import numpy as np
import pytest
import torch

from tests.ptx.instructions.conversions import E4M3, to_e4m3
from tests.ptx.programs import compute

GENERATOR = torch.Generator().manual_seed(0)
AWKWARD = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-45, -1e-40, 1.1754944e-38, 3.4e38, -3.4e38, 0.1, 2.5]
INTEGERS = [0, 1, -1, 2, -2, 31, 32, 33, 63, 255, 256, -256, 2**31 - 1, -(2**31), 0x12345678, -0x12345678]


def floats(count: int = 60) -> torch.Tensor:
    random = torch.randn(count - len(AWKWARD), generator=GENERATOR) * 10 ** (
        torch.rand(count - len(AWKWARD), generator=GENERATOR) * 8 - 4
    )
    return torch.cat([torch.tensor(AWKWARD), random])[torch.randperm(count, generator=GENERATOR)]


def integers(count: int = 60) -> torch.Tensor:
    random = torch.randint(-(2**31), 2**31 - 1, (count - len(INTEGERS),), generator=GENERATOR)
    return torch.cat([torch.tensor(INTEGERS), random])[torch.randperm(count, generator=GENERATOR)].int()


def wide_integers(count: int = 60) -> torch.Tensor:
    return integers(count).long() * 2**31 + integers(count).long()


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """To the bit, any NaN being like any other."""
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    if actual.dtype.is_floating_point:
        there = ~expected.isnan()
        assert torch.equal(actual.signbit()[there], expected.signbit()[there])


@pytest.mark.parametrize(("word", "torch_function"), [("add", torch.add), ("sub", torch.sub), ("mul", torch.mul)])
def test_float_sums_and_products(word, torch_function):
    a, b = floats(), floats()
    same(compute(f"{word}.rn.f32 %d, %a, %b;", torch.float32, a, b), torch_function(a, b))
    same(compute(f"{word}.rn.f64 %d, %a, %b;", torch.float64, a.double(), b.double()),
         torch_function(a.double(), b.double()))  # fmt: skip
    for kind, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        wide = torch_function(a.to(dtype).double(), b.to(dtype).double())
        expected = (
            torch.where(wide.isnan(), wide, wide).float().to(dtype) if dtype == torch.bfloat16 else wide.to(dtype)
        )
        same(compute(f"{word}.rn.{kind} %d, %a, %b;", dtype, a.to(dtype), b.to(dtype)), expected)


def test_packed_halves_are_two_sums():
    a, b = (torch.randn(128, generator=GENERATOR).bfloat16() for _ in range(2))
    packed = compute("add.rn.bf16x2 %d, %a, %b;", torch.int32, a.view(torch.int32), b.view(torch.int32))
    assert torch.equal(packed.view(torch.bfloat16), a + b)


def test_fma_rounds_once():
    a, b, c = floats(), floats(), floats()
    a[:20] = 1 + 2.0**-12
    b[:20] = 1 - 2.0**-12
    c[:20] = -1
    exact = (a.double() * b.double() + c.double()).float()
    same(compute("fma.rn.f32 %d, %a, %b, %c;", torch.float32, a, b, c), exact)
    a64 = torch.full((32,), 1 + 2.0**-40, dtype=torch.float64)
    b64, c64 = torch.full_like(a64, 1 - 2.0**-40), torch.full_like(a64, -1.0)
    assert (compute("fma.rn.f64 %d, %a, %b, %c;", torch.float64, a64, b64, c64) == -(2.0**-80)).all()


def test_ftz_takes_small_numbers_for_zeros_of_their_sign():
    a, one = torch.tensor([1e-40, -1e-40, 1e-20, 1.0]), torch.ones(4)
    same(compute("mul.rn.ftz.f32 %d, %a, %b;", torch.float32, a, one), torch.tensor([0.0, -0.0, 1e-20, 1.0]))
    same(compute("mul.rn.f32 %d, %a, %b;", torch.float32, a, one), a)


@pytest.mark.parametrize("word", ["min", "max"])
def test_float_extremes_leave_out_nan_and_order_zeros(word):
    a, b = floats(), floats()
    a[:4], b[:4] = torch.tensor([0.0, -0.0, math.nan, 1.0]), torch.tensor([-0.0, 0.0, 2.0, math.nan])
    expected = (torch.fmin if word == "min" else torch.fmax)(a, b)
    expected[:4] = torch.tensor([-0.0, -0.0, 2.0, 1.0] if word == "min" else [0.0, 0.0, 2.0, 1.0])
    same(compute(f"{word}.f32 %d, %a, %b;", torch.float32, a, b), expected)
    strict = (torch.minimum if word == "min" else torch.maximum)(a, b)
    strict[:2] = expected[:2]
    same(compute(f"{word}.NaN.f32 %d, %a, %b;", torch.float32, a, b), strict)


@pytest.mark.parametrize(
    ("line", "function"),
    [
        ("ex2.approx.f32 %d, %a;", torch.exp2),
        ("lg2.approx.f32 %d, %a;", torch.log2),
        ("rcp.approx.f32 %d, %a;", torch.reciprocal),
        ("rsqrt.approx.f32 %d, %a;", torch.rsqrt),
        ("sqrt.rn.f32 %d, %a;", torch.sqrt),
        ("tanh.approx.f32 %d, %a;", torch.tanh),
        ("neg.f32 %d, %a;", torch.neg),
        ("abs.f32 %d, %a;", torch.abs),
    ],
)
def test_float_functions_are_the_exact_result_rounded(line, function):
    a = floats()
    same(compute(line, torch.float32, a), function(a.double()).float())


@pytest.mark.parametrize("how", ["rn", "full", "approx"])
def test_float_quotients_are_rounded_to_nearest(how):
    a, b = floats(), floats()
    same(compute(f"div.{how}.f32 %d, %a, %b;", torch.float32, a, b), a / b)


INTEGER_LINES = [
    ("add.s32", lambda a, b: a + b),
    ("sub.s32", lambda a, b: a - b),
    ("mul.lo.s32", lambda a, b: a * b),
    ("mul.hi.s32", lambda a, b: (a * b) >> 32),
    ("mul.hi.u32", lambda a, b: ((a % 2**32) * (b % 2**32)) >> 32),
    ("min.s32", min),
    ("max.u32", lambda a, b: max(a % 2**32, b % 2**32)),
    ("and.b32", lambda a, b: a & b),
    ("or.b32", lambda a, b: a | b),
    ("xor.b32", lambda a, b: a ^ b),
    ("shl.b32", lambda a, b: (a << (b % 2**32)) if b % 2**32 < 32 else 0),
    ("shr.s32", lambda a, b: a >> min(b % 2**32, 31)),
    ("shr.u32", lambda a, b: (a % 2**32) >> min(b % 2**32, 32)),
    ("div.s32", lambda a, b: int(math.copysign(abs(a) // abs(b), a * b)) if b else None),
    ("div.u32", lambda a, b: (a % 2**32) // (b % 2**32) if b else None),
    ("rem.s32", lambda a, b: int(math.copysign(abs(a) % abs(b), a)) if b else None),
    ("rem.u32", lambda a, b: (a % 2**32) % (b % 2**32) if b else None),
]


@pytest.mark.parametrize(("word", "function"), INTEGER_LINES, ids=[word for word, _ in INTEGER_LINES])
def test_integer_arithmetic(word, function):
    a, b = integers(), integers()
    b[:16] = torch.arange(20, 36)
    found = compute(f"{word} %d, %a, %b;", torch.int32, a, b)
    for x, y, z in zip(a.tolist(), b.tolist(), found.tolist(), strict=True):
        expected = function(x, y)
        assert expected is None or (expected - z) % 2**32 == 0, (x, y, z)


def test_products_of_twice_the_width():
    a, b, c = integers(), integers(), wide_integers()
    assert torch.equal(compute("mul.wide.s32 %d, %a, %b;", torch.int64, a, b), a.long() * b.long())
    unsigned = (a.long() % 2**32) * (b.long() % 2**32)
    assert torch.equal(compute("mad.wide.u32 %d, %a, %b, %c;", torch.int64, a, b, c), unsigned + c)
    assert torch.equal(compute("mad.lo.s64 %d, %a, %b, %c;", torch.int64, c, c, c), c * c + c)


@pytest.mark.parametrize("line", ["bfe.u32 %d, %a, %b, 5;", "bfe.s32 %d, %a, %b, 5;", "bfe.s32 %d, %a, %b, 0;"])
def test_bit_fields(line):
    a, b = integers(), torch.arange(60, dtype=torch.int32) % 40
    length = int(line.split()[-1][:-1])
    for x, begin, found in zip(a.tolist(), b.tolist(), compute(line, torch.int32, a, b).tolist(), strict=True):
        bits = [
            x >> min(begin + place, 31) & 1 if "s32" in line or begin + place < 32 else 0 for place in range(length)
        ]
        expected = sum(bit << place for place, bit in enumerate(bits))
        if "s32" in line and length and bits[-1]:
            expected -= 1 << length
        assert found == expected, (x, begin)


def test_bits_are_inserted_counted_and_permuted():
    a, b = integers(), integers()
    bits = [x % 2**32 for x in a.tolist()]
    inserted = compute("bfi.b32 %d, %a, %b, 8, 12;", torch.int32, a, b)
    expected = [(y % 2**32 & ~0xFFF00) | ((x << 8) & 0xFFF00) for x, y in zip(bits, b.tolist(), strict=True)]
    assert [x % 2**32 for x in inserted.tolist()] == expected
    assert compute("popc.b32 %d, %a;", torch.int32, a).tolist() == [x.bit_count() for x in bits]
    assert compute("clz.b32 %d, %a;", torch.int32, a).tolist() == [32 - x.bit_length() for x in bits]
    assert compute("bfind.u32 %d, %a;", torch.int32, a).tolist() == [x.bit_length() - 1 for x in bits]
    assert [x % 2**32 for x in compute("brev.b32 %d, %a;", torch.int32, a).tolist()] == [
        int(f"{x:032b}"[::-1], 2) for x in bits
    ]
    swapped = compute("prmt.b32 %d, %a, %b, 0x7610;", torch.int32, a, b)
    assert [x % 2**32 for x in swapped.tolist()] == [
        (x & 0xFFFF) | (y % 2**32 & 0xFFFF0000) for x, y in zip(bits, b.tolist(), strict=True)
    ]
    assert torch.equal(compute("lop3.b32 %d, %a, %b, %c, 0x96;", torch.int32, a, b, a), b)  # a ^ b ^ a
    rotated = compute("shf.l.wrap.b32 %d, %a, %a, 8;", torch.int32, a)
    assert [x % 2**32 for x in rotated.tolist()] == [(x << 8 | x >> 24) % 2**32 for x in bits]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("setp.eq.f32 %p1, %a, %b;", lambda a, b: a == b),
        ("setp.ne.f32 %p1, %a, %b;", lambda a, b: (a != b) & ~a.isnan() & ~b.isnan()),
        ("setp.neu.f32 %p1, %a, %b;", lambda a, b: a != b),
        ("setp.lt.f32 %p1, %a, %b;", lambda a, b: a < b),
        ("setp.geu.f32 %p1, %a, %b;", lambda a, b: ~(a < b)),
        ("setp.num.f32 %p1, %a, %b;", lambda a, b: ~a.isnan() & ~b.isnan()),
        ("setp.gt.f32 %p2|%p1, %a, %b;", lambda a, b: ~(a > b)),
        ("setp.gt.f32 %p3, %a, %b; not.pred %p1, %p3;", lambda a, b: ~(a > b)),
        ("setp.gt.f32 %p3, %a, %b; setp.lt.and.f32 %p1, %a, 0f40000000, %p3;", lambda a, b: (a > b) & (a < 2)),
        ("setp.gt.f32 %p3, %a, %b; setp.lt.or.f32 %p1, %a, 0f40000000, !%p3;", lambda a, b: ~(a > b) | (a < 2)),
    ],
)
def test_float_comparisons(line, expected):
    a, b = floats(), floats()
    b[::3] = a[::3]
    chosen = compute(
        "selp.b32 %d, 1, 0, %p1;", torch.int32, a, b, extra=line.replace("%a", "%f10").replace("%b", "%f11")
    )
    assert torch.equal(chosen.bool(), expected(a, b))


def test_comparisons_of_packed_halves_give_two_predicates():
    a, b = (torch.randn(64, generator=GENERATOR).bfloat16() for _ in range(2))
    line = "setp.gt.bf16x2 %p1|%p2, %r10, %r11; selp.b32 %r20, 1, 0, %p1; selp.b32 %r21, 2, 0, %p2;"
    found = compute("or.b32 %d, %r20, %r21;", torch.int32, a.view(torch.int32), b.view(torch.int32), extra=line)
    assert torch.equal(found, ((a > b).view(32, 2).int() * torch.tensor([1, 2])).sum(1).int())


def test_conversions_between_floats_round_to_nearest_even():
    a = floats()
    for kind, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        same(compute(f"cvt.rn.{kind}.f32 %d, %a;", dtype, a), a.to(dtype))
        same(compute(f"cvt.f32.{kind} %d, %a;", torch.float32, a.to(dtype)), a.to(dtype).float())
        packed = compute(f"cvt.rn.{kind}x2.f32 %d, %a, %b;", torch.int32, a, a + 1).view(dtype).view(-1, 2)
        same(packed[:, 1].contiguous(), a.to(dtype))
        same(packed[:, 0].contiguous(), (a + 1).to(dtype))
    same(compute("cvt.rn.f32.f64 %d, %a;", torch.float32, a.double() * 1.00000003), (a.double() * 1.00000003).float())


def test_middles_between_halves_go_to_even():
    middles = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, -(1 + 2.0**-8), 1 + 2.0**-8 + 2.0**-23])
    expected = torch.tensor([1, 1 + 2.0**-6, -1, 1 + 2.0**-7]).bfloat16()
    same(compute("cvt.rn.bf16.f32 %d, %a;", torch.bfloat16, middles), expected)


def test_conversions_to_integers_go_to_the_limits():
    a = torch.tensor([1.5, -1.5, 2.5, math.nan, math.inf, -math.inf, 3e9, -3e9, 1e20])
    top, low = 2**31 - 1, -(2**31)
    assert compute("cvt.rzi.s32.f32 %d, %a;", torch.int32, a).tolist() == [1, -1, 2, 0, top, low, top, low, top]
    assert compute("cvt.rni.s32.f32 %d, %a;", torch.int32, a)[:3].tolist() == [2, -2, 2]
    wide = compute("cvt.rzi.s64.f32 %d, %a;", torch.int64, a).tolist()
    assert wide == [1, -1, 2, -(2**63), 2**63 - 1, -(2**63), 3 * 10**9, -3 * 10**9, 2**63 - 1]


def test_conversions_between_integers_cut_and_extend():
    a, b = integers(), wide_integers()
    assert torch.equal(compute("cvt.s64.s32 %d, %a;", torch.int64, a), a.long())
    assert torch.equal(compute("cvt.u64.u32 %d, %a;", torch.int64, a), a.long() % 2**32)
    assert torch.equal(compute("cvt.u32.u64 %d, %a;", torch.int32, b), b.int())
    assert torch.equal(compute("cvt.rn.f32.s32 %d, %a;", torch.float32, a), a.float())


def test_e4m3_rounds_to_nearest_even_and_stays_finite():
    a = torch.cat([floats() * 10, torch.linspace(-500, 500, 1001), 2.0 ** torch.arange(-12.0, 9)])
    inside = a.clamp(-448, 448)
    expected = inside.to(torch.float8_e4m3fn).float()
    found = compute("cvt.rn.satfinite.e4m3x2.f32 %d, %a, %b;", torch.int16, a, a).view(torch.uint8).view(-1, 2)
    for place in range(2):
        same(torch.from_numpy(E4M3[found[:, place].numpy()]), expected)
    codes = torch.arange(256, dtype=torch.uint8)
    halves = compute("cvt.rn.f16x2.e4m3x2 %d, %a;", torch.int32, codes.view(torch.int16)).view(torch.float16)
    same(halves.float(), codes.view(torch.float8_e4m3fn).float())
    assert torch.equal(torch.from_numpy(to_e4m3(E4M3[:127])), codes[:127])


def test_moves_pack_and_unpack():
    a, b = integers(), integers()
    packed = compute("mov.b64 %d, {%a, %b};", torch.int64, a, b)
    assert torch.equal(packed.view(torch.int32).view(-1, 2), torch.stack([a, b], 1))
    swapped = compute("mov.b32 %d, {%h2, %h1};", torch.int32, a, extra="mov.b32 {%h1, %h2}, %r10;")
    assert torch.equal(swapped.view(torch.int16).view(-1, 2), a.view(torch.int16).view(-1, 2).flip(1))
    assert (compute("mov.f32 %d, 0f3FC00000;", torch.float32, a) == 1.5).all()
    assert np.all(compute("mov.b32 %d, -1;", torch.int32, a).numpy() == -1)
