import pytest
import torch

from engine.errors import InputError
from engine.kernels.op import use_backend, use_isa
from engine.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference
from tests.kernels.cases import DTYPES, ISAS, assert_near, grad_of, needs_cpu, randn, record, threads, weight_of
from tests.row_invariance import assert_row_invariant, assert_same_bits

EPS = 1e-5
SHAPES = [(9, 41), (7, 64), (130, 768), (1, 16)]
pytestmark = needs_cpu


def gradients(dtype, shape, backend="cpu"):
    """dx and dw of sum(a * x' + b * norm(x')) with x' = x + delta, from the op and from float64 autograd."""
    x, delta, a, b = (randn(*shape, seed=s).to(dtype) for s in range(4))
    weight = weight_of(randn(shape[1]) + 1, dtype)
    with use_backend(backend):
        leaf = x.clone().requires_grad_()
        total, out = add_rms_norm(leaf, delta, weight, EPS)
        torch.autograd.backward([total, out], [a, b])
    wide, wide_weight = (x + delta).double().requires_grad_(), weight.dense().double().requires_grad_()
    torch.autograd.backward([wide, rms_norm_reference(wide, wide_weight, EPS)], [a.double(), b.double()])
    return grad_of(leaf), grad_of(weight), grad_of(wide), grad_of(wide_weight)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_matches_the_definition(isa, dtype, shape):
    x, weight = randn(*shape, scale=3).to(dtype), weight_of(randn(shape[1]), dtype)
    with use_isa(isa):
        assert_near(rms_norm(x, weight, EPS), rms_norm_reference(x, weight.data, EPS), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_addition_equals_two_steps_bitwise(dtype):
    x, delta = randn(9, 41).to(dtype), randn(9, 41, seed=1).to(dtype)
    weight = weight_of(randn(41), dtype)
    total, out = add_rms_norm(x, delta, weight, EPS)
    assert_same_bits(total, x + delta, "sum")
    assert_same_bits(out, rms_norm(x + delta, weight, EPS), "norm")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_sum_made_before_has_the_same_bits_and_gradients(backend, dtype):
    """A stage of a pipeline that receives x + delta goes on as if it had added them itself."""
    x, delta, a, b = (randn(9, 41, seed=s).to(dtype) for s in range(4))
    found = []
    for before in (False, True):
        weight = weight_of(randn(41), dtype)
        leaf = (x + delta if before else x.clone()).requires_grad_()
        with use_backend(backend):
            outputs = add_rms_norm(leaf, None if before else delta, weight, EPS)
            torch.autograd.backward(outputs, [a, b])
        found.append([*outputs, grad_of(leaf), grad_of(weight)])
    for what, apart, fused in zip(("sum", "norm", "dx", "dw"), *found, strict=True):
        assert_same_bits(apart, fused, what)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_row_invariant(isa, dtype):
    weight, x = weight_of(randn(41), dtype), randn(37, 82).to(dtype)
    with use_isa(isa):
        assert_row_invariant(lambda r: rms_norm(r[:, :41].contiguous(), weight, EPS), x)
        pair = lambda r: torch.cat(add_rms_norm(r[:, :41].contiguous(), r[:, 41:].contiguous(), weight, EPS), 1)  # noqa: E731
        assert_row_invariant(pair, x)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_gradients_match_float64_autograd(isa, dtype, shape):
    with use_isa(isa):
        dx, dw, expected_dx, expected_dw = gradients(dtype, shape)
    assert_near(dx, expected_dx, dtype, ulps=4)
    assert_near(dw, expected_dw, dtype, ulps=8)


def test_torch_backend_has_the_same_gradients():
    dx, dw, expected_dx, expected_dw = gradients(torch.float32, (9, 41), "torch")
    assert_near(dx, expected_dx, torch.float32, ulps=4)
    assert_near(dw, expected_dw, torch.float32, ulps=8)


def test_weight_gradient_accumulates_over_calls():
    x, weight = randn(5, 20).requires_grad_(), weight_of(randn(20), torch.float32)
    rms_norm(x, weight, EPS).sum().backward()
    once = grad_of(weight).clone()
    rms_norm(x, weight, EPS).sum().backward()
    assert_same_bits(grad_of(weight), 2 * once, "gradient after two calls")


def test_bits_do_not_depend_on_threads():
    results = []
    for count in (1, 2):
        with threads(count):
            results.append(gradients(torch.bfloat16, (300, 384))[:2])
    for one, two in zip(*results, strict=True):
        assert_same_bits(one, two, "1 and 2 threads")


def test_replay_equals_eager_for_fewer_rows():
    weight, x, delta = weight_of(randn(41), torch.float32), randn(12, 41), randn(12, 41, seed=1)
    graph, (total, out) = record(lambda: add_rms_norm(x, delta, weight, EPS))
    x.copy_(randn(12, 41, seed=2))
    graph.replay(5)
    expected = add_rms_norm(x[:5], delta[:5], weight, EPS)
    assert_same_bits(total[:5], expected[0], "sum")
    assert_same_bits(out[:5], expected[1], "norm")


def test_matches_llama_of_transformers_bitwise_in_bfloat16_rounding():
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    norm = modeling.LlamaRMSNorm(64, EPS).bfloat16()
    norm.weight.data = randn(64).bfloat16()
    x = randn(50, 64, scale=2).bfloat16()
    ours = rms_norm(x, weight_of(norm.weight.data, torch.bfloat16), EPS)
    assert (ours == norm(x)).float().mean() > 0.99  # rstd may differ in the last float32 bit


def test_a_weight_of_another_width_is_refused():
    with pytest.raises(InputError, match=r"weight has shape \[8\]; it must be \[7\]"):
        rms_norm(torch.zeros(2, 7), weight_of(torch.ones(8), torch.float32), EPS)


@pytest.mark.parametrize("isa", ISAS)
def test_every_kind_of_bfloat16_sum_is_rounded_as_torch_rounds(isa):
    """Random bit patterns: ties, subnormals, overflow to infinity, infinities and NaN, in vectors and in tails."""
    bits = torch.randint(-(2**15), 2**15, (2, 997, 61), generator=torch.Generator().manual_seed(0), dtype=torch.int16)
    x, delta = bits.view(torch.bfloat16)
    near = x * torch.linspace(-2.0, 2.0, 61).bfloat16()  # of one size, so that sums do round
    weight = weight_of(torch.ones(61), torch.bfloat16)
    with use_isa(isa):
        for other in (delta, near):
            assert_same_bits(add_rms_norm(x, other.contiguous(), weight, EPS)[0], x + other, "sum")
