import math

import pytest
import torch

from engine.kernels.adamw import adamw_, squared_norm
from engine.kernels.op import use_backend
from tests.kernels.cases import ADAMW, adamw_of_torch, randn
from tests.kernels.triton.cases import DEVICE, DTYPES, device_weight, needs_triton
from tests.row_invariance import assert_same_bits

pytestmark = needs_triton


def steps(shape, dtype, count=3, **changes):
    """Weight, master and moments after a few steps from seeded gradients."""
    weight = device_weight(randn(*shape), dtype)
    master, exp_avg, exp_avg_sq = (
        tensor.to(DEVICE) for tensor in (randn(*shape), torch.zeros(shape), torch.zeros(shape))
    )
    for step in range(1, count + 1):
        weight.grad_buffer().copy_(randn(*shape, seed=step))
        with use_backend("triton"):
            adamw_(weight, master, exp_avg, exp_avg_sq, step=step, **ADAMW, **changes)
    return weight, master, exp_avg, exp_avg_sq


@pytest.mark.parametrize("shape", [(1,), (41, 37), (1024,)])
def test_matches_torch_adamw(shape):
    _, master, exp_avg, exp_avg_sq = steps(shape, torch.float32, grad_scale=0.5)
    theirs = adamw_of_torch(shape, grad_scale=0.5)
    for actual, expected, limit in zip((master, exp_avg, exp_avg_sq), theirs, (1e-7, 1e-7, 1e-9), strict=True):
        torch.testing.assert_close(actual.cpu(), expected, rtol=2e-6, atol=limit)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compute_weight_is_the_rounded_master(dtype):
    weight, master, *_ = steps((41, 37), dtype)
    assert_same_bits(weight.data, master.to(dtype), "weight")


@pytest.mark.parametrize("count", [1, 1025, 40000])
def test_squared_norm_matches_double(count):
    values = randn(count).to(DEVICE)
    with use_backend("triton"):
        assert squared_norm(values) == pytest.approx(float(values.double().pow(2).sum()), rel=1e-12)


def test_squared_norm_of_many_chunks_folds_them_all(monkeypatch):
    backend = pytest.importorskip("engine.kernels.triton.adamw")
    monkeypatch.setattr(backend, "_CHUNK", 1024)
    monkeypatch.setattr(backend, "_FOLD", 4)
    values = randn(9000).to(DEVICE)
    with use_backend("triton"):
        assert squared_norm(values) == pytest.approx(float(values.double().pow(2).sum()), rel=1e-12)


def test_squared_norm_of_a_tensor_that_is_not_finite_is_not():
    values = randn(20000).to(DEVICE)
    values[17000] = math.nan
    with use_backend("triton"):
        assert math.isnan(squared_norm(values))


def test_squared_norm_of_nothing_is_zero():
    with use_backend("triton"):
        assert squared_norm(torch.empty(0, device=DEVICE)) == 0.0
