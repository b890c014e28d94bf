import pytest

from engine.kernels.op import use_backend
from engine.kernels.swiglu import swiglu, swiglu_reference
from tests.kernels.cases import assert_near, grad_of, randn
from tests.kernels.triton.cases import DEVICE, DTYPES, needs_triton
from tests.row_invariance import assert_row_invariant

pytestmark = needs_triton
SHAPES = [(1, 2), (3, 14), (5, 2 * 1041)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_forward_is_that_of_the_definition_in_double(rows, columns, dtype):
    x = randn(rows, columns).to(DEVICE, dtype)
    with use_backend("triton"):
        assert_near(swiglu(x), swiglu_reference(x.double()), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_gradient_is_that_of_the_definition_in_double(rows, columns, dtype):
    x, dy = randn(rows, columns).to(DEVICE, dtype), randn(rows, columns // 2, seed=1).to(DEVICE, dtype)
    wide = x.double().requires_grad_()
    swiglu_reference(wide).backward(dy.double())
    x.requires_grad_()
    with use_backend("triton"):
        swiglu(x).backward(dy)
    assert_near(grad_of(x), grad_of(wide), dtype, ulps=4.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_invariant(dtype):
    with use_backend("triton"):
        assert_row_invariant(swiglu, randn(7, 2 * 9).to(DEVICE, dtype))
