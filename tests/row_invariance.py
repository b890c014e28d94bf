"""The contract of every op of the forward, as one assertion: a row's bits do not depend on the rows beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def same_bits(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise: the same value or both NaN. Unlike ==, it tells -0 from +0."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    same = a.contiguous().view(integers) == b.contiguous().view(integers)
    return same | (a.isnan() & b.isnan()) if a.is_floating_point() else same


def assert_same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    """Fails with the first coordinate at which the two tensors differ."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} against {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} against {expected.dtype}"
    different = (~same_bits(actual, expected)).nonzero()
    if len(different):
        at = tuple(different[0].tolist())
        raise AssertionError(
            f"{what}: {len(different)} of {actual.numel()} elements differ, the first at {at}: "
            f"{actual[at].item()!r} against {expected[at].item()!r}"
        )


PADDING = ((1, 0), (0, 1), (7, 30), (64, 3))  # rows before and after


def assert_row_invariant(
    op: Callable[[Tensor], Tensor], rows: Tensor, padding: Sequence[tuple[int, int]] = PADDING
) -> None:
    """`op` maps [T, ...] to [T, ...]; row t of its output must have the same bits whatever shares the call with it.

    Shuffles, splits (into singles, and at odd points), repeats and pads the rows (with zeros, and with large values in
    front and behind), and compares with the output of the whole.
    """
    num_rows = rows.shape[0]
    whole = op(rows)
    generator = torch.Generator().manual_seed(num_rows)

    order = torch.randperm(num_rows, generator=generator)
    assert_same_bits(op(rows[order].contiguous()), whole[order], "shuffled rows")

    singles = torch.cat([op(rows[t : t + 1].contiguous()) for t in range(num_rows)])
    assert_same_bits(singles, whole, "one row at a time")

    for size in (2, 3, 5, 16, 33):
        if size < num_rows:
            parts = torch.cat([op(part.contiguous()) for part in rows.split(size)])
            assert_same_bits(parts, whole, f"split into {size} rows a call")

    twice = op(torch.cat([rows, rows]))
    assert_same_bits(twice[:num_rows], whole, "repeated rows, first copy")
    assert_same_bits(twice[num_rows:], whole, "repeated rows, second copy")

    for before, after in padding:
        for fill in (0, 100):
            front = torch.full((before, *rows.shape[1:]), fill, dtype=rows.dtype, device=rows.device)
            back = torch.full((after, *rows.shape[1:]), fill, dtype=rows.dtype, device=rows.device)
            padded = op(torch.cat([front, rows, back]))[before : before + num_rows]
            assert_same_bits(padded, whole, f"{before} rows of {fill} before and {after} after")
