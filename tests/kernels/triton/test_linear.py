import pytest
import torch

from engine.errors import InputError
from engine.kernels.linear import linear, linear_grad_bias_, linear_grad_weight_
from engine.kernels.op import use_backend
from tests.kernels.cases import grad_of, randn
from tests.kernels.triton.cases import DEVICE, DTYPES, device_weight, needs_triton
from tests.row_invariance import assert_row_invariant, assert_same_bits

pytestmark = needs_triton
# (T, N, K): single elements, odd everything, whole tiles, several tiles of rows and columns
SHAPES = [(1, 1, 1), (7, 9, 17), (64, 64, 64), (67, 41, 130), (9, 130, 70)]


def assert_close(actual, expected, magnitude, dtype, terms):
    """Within the error bound of a float32 sum of `terms` products (Higham, section 3.1) and one rounding to `dtype`;
    `magnitude` is the same sum over absolute values."""
    bound = torch.finfo(torch.float32).eps * (terms + 2) * magnitude + torch.finfo(dtype).eps * expected.abs()
    bad = ((actual.double() - expected).abs() > bound).nonzero()
    assert not len(bad), f"{len(bad)} elements are off, the first at {bad[0].tolist()}"


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients_agree_with_double(shape, dtype, with_bias):
    tokens, columns, width = shape
    weight = device_weight(randn(columns, width), dtype, grad=1.0)
    bias = device_weight(randn(columns, seed=1), dtype, grad=2.0) if with_bias else None
    x, dy = randn(tokens, width, seed=2).to(DEVICE, dtype).requires_grad_(), randn(tokens, columns).to(DEVICE, dtype)
    with use_backend("triton"):
        y = linear(x, weight, bias)
        y.backward(dy)
    x_, w_, dy_ = x.detach().double(), weight.data.double(), dy.double()
    b_ = torch.zeros(columns, device=DEVICE).double() if bias is None else bias.data.double()
    assert y.dtype == dtype
    assert_close(y.detach(), x_ @ w_.T + b_, x_.abs() @ w_.abs().T + b_.abs(), dtype, width)
    assert_close(grad_of(x), dy_ @ w_, dy_.abs() @ w_.abs(), dtype, columns)
    assert_close(grad_of(weight), 1 + dy_.T @ x_, 1 + dy_.abs().T @ x_.abs(), torch.float32, tokens)
    if bias is not None:
        assert_close(grad_of(bias), 2 + dy_.sum(0), 2 + dy_.abs().sum(0), torch.float32, tokens)


def test_half_precision_can_be_written_in_float32():
    x, weight = randn(5, 70).to(DEVICE, torch.float16), device_weight(randn(9, 70), torch.float16)
    with use_backend("triton"):
        y = linear(x, weight, out_dtype=torch.float32)
    expected, magnitude = x.double() @ weight.data.double().T, x.double().abs() @ weight.data.double().abs().T
    assert y.dtype == torch.float32
    assert_close(y, expected, magnitude, torch.float32, 70)


def test_rows_may_lie_apart():
    wide, weight = randn(9, 90).to(DEVICE), device_weight(randn(20, 40), torch.float32)
    dy, apart = randn(9, 50).to(DEVICE), device_weight(randn(20, 40), torch.float32)
    with use_backend("triton"):
        assert_same_bits(linear(wide[:, 10:50], weight), linear(wide[:, 10:50].contiguous(), weight), "output")
        linear_grad_weight_(dy[:, 30:], wide[:, 10:50], apart)
        linear_grad_weight_(dy[:, 30:].contiguous(), wide[:, 10:50].contiguous(), weight)
    assert_same_bits(grad_of(apart), grad_of(weight), "weight gradient")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_invariant(dtype):
    weight, bias = device_weight(randn(70, 130), dtype), device_weight(randn(70), dtype)
    with use_backend("triton"):
        assert_row_invariant(lambda x: linear(x, weight, bias), randn(6, 130).to(DEVICE, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tile_gives_the_same_bits(dtype, monkeypatch):
    """The number of rows chooses the tile; the bits of a row must not know it."""
    tiles = pytest.importorskip("engine.kernels.triton.linear")
    weight, x = device_weight(randn(130, 200), dtype), randn(130, 200).to(DEVICE, dtype)
    with use_backend("triton"):
        few = linear(x, weight)
        monkeypatch.setattr(tiles, "_PROGRAMS", 1)
        assert_same_bits(linear(x, weight), few, "the biggest tile against the smallest")


def test_gradients_are_the_same_bits_every_time():
    dy, x = randn(130, 20).to(DEVICE), randn(130, 30).to(DEVICE)
    weights = [device_weight(randn(20, 30), torch.float32) for _ in range(2)]
    biases = [device_weight(randn(20), torch.float32) for _ in range(2)]
    with use_backend("triton"):
        for weight, bias in zip(weights, biases, strict=True):
            linear_grad_weight_(dy, x, weight)
            linear_grad_bias_(dy, bias)
    assert_same_bits(grad_of(weights[0]), grad_of(weights[1]), "weight")
    assert_same_bits(grad_of(biases[0]), grad_of(biases[1]), "bias")


def test_no_rows_give_nothing_and_leave_gradients_alone():
    weight, bias = device_weight(randn(20, 30), torch.float32, grad=3.0), device_weight(randn(20), torch.float32, 3.0)
    x = torch.empty(0, 30, device=DEVICE, requires_grad=True)
    with use_backend("triton"):
        y = linear(x, weight, bias)
        y.sum().backward()
    assert y.shape == (0, 20)
    assert grad_of(x).shape == (0, 30)
    assert (grad_of(weight) == 3).all()
    assert (grad_of(bias) == 3).all()


def test_tensors_of_two_devices_are_refused():
    weight = device_weight(randn(20, 30), torch.float32)
    with use_backend("triton"), pytest.raises(InputError, match="x is on meta and weight w on"):
        linear(torch.empty(3, 30, device="meta"), weight)
