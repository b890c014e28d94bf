"""The helper that holds the contract must itself catch a kernel that breaks it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.row_invariance import assert_row_invariant


def test_an_op_that_looks_at_one_row_passes() -> None:
    assert_row_invariant(lambda rows: rows * 3, torch.randn(20, 5))


def test_an_op_whose_sum_depends_on_the_number_of_rows_is_caught() -> None:
    def op(rows: Tensor) -> Tensor:
        return rows.sum(1, keepdim=True) if len(rows) > 1 else rows.flip(1).cumsum(1)[:, -1:]

    with pytest.raises(AssertionError, match=r"first at"):
        assert_row_invariant(op, torch.randn(20, 301))


def test_an_op_that_depends_on_the_place_of_a_row_is_caught() -> None:
    def op(rows: Tensor) -> Tensor:
        return rows + 1e-3 * (torch.arange(len(rows)) % 2)[:, None]

    with pytest.raises(AssertionError, match=r"first at"):
        assert_row_invariant(op, torch.randn(20, 5))
