import pytest
import torch

from engine.errors import InputError
from engine.kernels.adamw import adamw_, squared_norm
from engine.kernels.op import use_isa
from tests.kernels.cases import ADAMW, ISAS, adamw_of_torch, code_path, needs_cpu, randn, threads, weight_of
from tests.row_invariance import assert_same_bits

pytestmark = needs_cpu
SHAPES = [(41, 37), (16, 256), (33, 515), (4097,), (7,)]


def steps(shape, dtype, packed, count=3, **changes):
    """Weight, master and moments after a few steps from seeded gradients."""
    weight = weight_of(randn(*shape), dtype, packed)
    master, exp_avg, exp_avg_sq = randn(*shape), torch.zeros(shape), torch.zeros(shape)
    for step in range(1, count + 1):
        weight.grad_buffer().copy_(randn(*shape, seed=step))
        adamw_(weight, master, exp_avg, exp_avg_sq, step=step, **ADAMW, **changes)
    return weight, master, exp_avg, exp_avg_sq


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("isa", [*ISAS, "torch"])
def test_matches_torch_adamw(isa, shape):
    with code_path(isa):
        _, master, exp_avg, exp_avg_sq = steps(shape, torch.float32, False, grad_scale=0.5)
    theirs = adamw_of_torch(shape, grad_scale=0.5)
    for actual, expected, limit in zip((master, exp_avg, exp_avg_sq), theirs, (1e-7, 1e-7, 1e-9), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=limit)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", ISAS)
def test_compute_weight_is_the_rounded_master_in_its_own_layout(isa, dtype, shape):
    packed = len(shape) == 2
    with use_isa(isa):
        weight, master, *_ = steps(shape, dtype, packed)
    assert_same_bits(weight.data, weight_of(master, dtype, packed).data, "storage, padding included")


def test_packed_and_dense_weights_step_alike():
    for one, two in zip(
        steps((33, 515), torch.float32, True)[1:], steps((33, 515), torch.float32, False)[1:], strict=True
    ):
        assert_same_bits(one, two, "state")


def test_bits_do_not_depend_on_threads():
    results = []
    for count in (1, 2):
        with threads(count):
            weight, *state = steps((200, 515), torch.bfloat16, True)
            results.append((weight.data, *state))
    for one, two in zip(*results, strict=True):
        assert_same_bits(one, two, "1 and 2 threads")


def test_step_0_is_refused():
    weight = weight_of(torch.zeros(4), torch.float32)
    with pytest.raises(InputError, match="the first step is 1"):
        adamw_(weight, torch.zeros(4), torch.zeros(4), torch.zeros(4), step=0, **ADAMW)


@pytest.mark.parametrize("count", [1, 15, 16384, 100003])
@pytest.mark.parametrize("isa", [*ISAS, "torch"])
def test_squared_norm_matches_float64(isa, count):
    values = randn(count)
    with code_path(isa):
        assert squared_norm(values) == pytest.approx(float(values.double().pow(2).sum()), rel=1e-12)


def test_squared_norm_does_not_depend_on_threads():
    values, norms = randn(200000), []
    for count in (1, 2):
        with threads(count):
            norms.append(squared_norm(values))
    assert norms[0] == norms[1]


def test_squared_norm_of_a_tensor_that_is_not_finite_is_not():
    values = randn(20000)
    values[17000] = float("nan")
    assert squared_norm(values) != squared_norm(values)
