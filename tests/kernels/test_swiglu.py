import pytest
import torch

from engine.errors import InputError
from engine.kernels.op import use_isa
from engine.kernels.swiglu import swiglu, swiglu_reference
from tests.kernels.cases import DTYPES, ISAS, assert_near, code_path, grad_of, needs_cpu, randn, record, threads
from tests.row_invariance import assert_row_invariant, assert_same_bits

SHAPES = [(9, 82), (7, 128), (33, 2 * 769), (1, 2)]
pytestmark = needs_cpu


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_matches_the_definition(isa, dtype, shape):
    x = randn(*shape, scale=4).to(dtype)
    with use_isa(isa):
        assert_near(swiglu(x), swiglu_reference(x), dtype)


@pytest.mark.parametrize("isa", ISAS)
def test_the_vector_exponential_is_within_3_roundings(isa):
    """silu(-x) = -x / (1 + e^x): over the whole range of e^x each element stays within 3 units in the last place."""
    gate = torch.linspace(-88.5, 88.5, 1 << 16)
    expected = gate.double() / (1 + torch.exp(-gate.double()))
    with use_isa(isa):
        actual = swiglu(torch.stack([gate, torch.ones_like(gate)], 1).flatten().reshape(-1, 2))[:, 0]
    normal = expected.abs() > 1e-35
    error = ((actual - expected).abs() / expected.abs())[normal].max()
    assert error < 3 * 2**-24 * 2, f"relative error {error:.2e}"


@pytest.mark.parametrize("isa", ISAS)
def test_extremes_stay_finite_and_nan_stays_nan(isa):
    gate = torch.tensor([-1e30, -200.0, 0.0, 200.0, float("nan")])
    with use_isa(isa):
        out = swiglu(torch.stack([gate, torch.ones(5)], 1).contiguous())[:, 0]
    assert out[:4].tolist() == [0.0, 0.0, 0.0, 200.0]
    assert out[4].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_row_invariant(isa, dtype):
    with use_isa(isa):
        assert_row_invariant(swiglu, randn(37, 82).to(dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", [*ISAS, "torch"])
def test_gradient_matches_float64_autograd(isa, dtype, shape):
    x, dy = randn(*shape, scale=2).to(dtype), randn(shape[0], shape[1] // 2).to(dtype)
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    with code_path(isa):
        swiglu(leaf).backward(dy)
    swiglu_reference(wide).backward(dy.double())
    assert_near(grad_of(leaf), grad_of(wide), dtype, ulps=2)


def test_bits_do_not_depend_on_threads():
    x = randn(200, 600).bfloat16()
    results = []
    for count in (1, 2):
        with threads(count):
            results.append(swiglu(x))
    assert_same_bits(results[0], results[1], "1 and 2 threads")


def test_replay_equals_eager_for_fewer_rows():
    x = randn(12, 82)
    graph, out = record(lambda: swiglu(x))
    x.copy_(randn(12, 82, seed=2))
    graph.replay(5)
    assert_same_bits(out[:5], swiglu(x[:5]), "replay")


def test_an_odd_number_of_columns_is_refused():
    with pytest.raises(InputError, match="7 columns"):
        swiglu(torch.zeros(2, 7))
