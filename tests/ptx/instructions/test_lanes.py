"""Values that move among the lanes of a warp, and what its lanes find out together."""

import pytest
import torch

from tests.ptx.programs import warp

GENERATOR = torch.Generator().manual_seed(0)


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
