import pytest
import torch

from tests.kernels.cases import assert_near, randn
from tests.kernels.triton.cases import DEVICE, needs_triton
from tests.row_invariance import assert_same_bits

pytest.importorskip("triton")
from engine.kernels.triton.column_sum import add_column_sums_

pytestmark = needs_triton


@pytest.mark.parametrize("rows", [1, 256, 257, 600])
def test_adds_the_sum_of_the_rows_in_double(rows):
    x, out = randn(rows, 70).to(DEVICE), randn(70, seed=1).to(DEVICE)
    expected = out.double() + x.double().sum(0)
    add_column_sums_(x, out)
    assert_near(out, expected, torch.float32, ulps=16)


def test_rows_may_lie_apart():
    x, packed, apart = randn(20, 70).to(DEVICE), torch.zeros(30, device=DEVICE), torch.zeros(30, device=DEVICE)
    add_column_sums_(x[:, 10:40].contiguous(), packed)
    add_column_sums_(x[:, 10:40], apart)
    assert_same_bits(apart, packed, "strided rows")


def test_no_rows_change_nothing():
    out = randn(9).to(DEVICE)
    before = out.clone()
    add_column_sums_(torch.empty(0, 9, device=DEVICE), out)
    assert_same_bits(out, before, "sum of nothing")
