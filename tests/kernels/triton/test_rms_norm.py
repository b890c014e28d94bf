import pytest
import torch

from engine.errors import InputError
from engine.kernels.op import use_backend
from engine.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference
from tests.kernels.cases import assert_near, grad_of, randn
from tests.kernels.triton.cases import DEVICE, DTYPES, device_weight, needs_triton
from tests.row_invariance import assert_row_invariant, assert_same_bits

pytestmark = needs_triton
EPS = 1e-5
SHAPES = [(1, 1), (9, 41), (35, 768)]


def tensors(count, shape, dtype):
    return [randn(*shape, seed=seed).to(DEVICE, dtype) for seed in range(count)]


def gradients(dtype, shape):
    """dx and dw of sum(a * x' + b * norm(x')) with x' = x + delta, from the op and from float64 autograd."""
    x, delta, a, b = tensors(4, shape, dtype)
    weight = device_weight(randn(shape[1]) + 1, dtype)
    leaf = x.clone().requires_grad_()
    with use_backend("triton"):
        torch.autograd.backward(add_rms_norm(leaf, delta, weight, EPS), [a, b])
    wide, wide_weight = (x + delta).double().requires_grad_(), weight.dense().double().requires_grad_()
    torch.autograd.backward([wide, rms_norm_reference(wide, wide_weight, EPS)], [a.double(), b.double()])
    return grad_of(leaf), grad_of(weight), grad_of(wide), grad_of(wide_weight)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_is_that_of_the_definition_in_double(dtype, shape):
    x, weight = randn(*shape, scale=3).to(DEVICE, dtype), device_weight(randn(shape[1]), dtype)
    with use_backend("triton"):
        out = rms_norm(x, weight, EPS)
    assert_near(out, rms_norm_reference(x.double(), weight.data.double(), EPS), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_addition_equals_two_steps_bitwise(dtype):
    (x, delta), weight = tensors(2, (9, 41), dtype), device_weight(randn(41), dtype)
    with use_backend("triton"):
        total, out = add_rms_norm(x, delta, weight, EPS)
        assert_same_bits(total, x + delta, "sum")
        assert_same_bits(out, rms_norm(x + delta, weight, EPS), "norm")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_the_definition_in_double(dtype, shape):
    dx, dw, expected_dx, expected_dw = gradients(dtype, shape)
    assert_near(dx, expected_dx, dtype, ulps=4)
    assert_near(dw, expected_dw, dtype, ulps=8)


def test_a_gradient_is_the_same_bits_every_time():
    for one, two in zip(gradients(torch.float32, (35, 41)), gradients(torch.float32, (35, 41)), strict=True):
        assert_same_bits(one, two, "two runs")


def test_the_gradient_of_a_weight_is_added_to_what_is_there():
    x, dy = tensors(2, (40, 5), torch.float32)  # three chunks of rows
    apart, together = device_weight(randn(5), torch.float32), device_weight(randn(5), torch.float32, grad=2.5)
    with use_backend("triton"):
        for weight in (apart, together):
            rms_norm(x.clone().requires_grad_(), weight, EPS).backward(dy)
    assert_near(grad_of(together), grad_of(apart).double() + 2.5, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_invariant(dtype):
    weight = device_weight(randn(41), dtype)

    def pair(rows):
        return torch.cat(add_rms_norm(rows[:, :41].contiguous(), rows[:, 41:].contiguous(), weight, EPS), 1)

    with use_backend("triton"):
        assert_row_invariant(pair, randn(7, 82).to(DEVICE, dtype))


def test_no_rows_give_nothing_and_leave_the_gradient_alone():
    weight, x = device_weight(randn(41), torch.float32, grad=3.0), torch.empty(0, 41, device=DEVICE, requires_grad=True)
    with use_backend("triton"):
        out = rms_norm(x, weight, EPS)
        out.sum().backward()
    assert out.shape == grad_of(x).shape == (0, 41)
    assert (grad_of(weight) == 3).all()


def test_tensors_of_two_devices_are_refused():
    x, weight = torch.empty(3, 41, device="meta"), device_weight(randn(41), torch.float32)
    with use_backend("triton"), pytest.raises(InputError, match=r"weight is on .* first tensor is on meta"):
        rms_norm(x, weight, EPS)
