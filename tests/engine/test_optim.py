"""The optimizer: AdamW and clipping against their plain definitions, schedules, and gradients that are not finite."""

import itertools
import math

import numpy as np
import pytest
import torch

from engine.config import OptimizerConfig
from engine.errors import ConfigError, InputError, NumericsError
from engine.kernels.weight import Weight
from engine.optim import AdamW, learning_rate
from engine.parallel.ownership import Shares


def make_weights(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = [
        Weight("matrix", (37, 19), dtype, packed=True),
        Weight("vector", (19,), dtype, packed=False, decay=False),
    ]
    for weight in weights:
        weight.load_(torch.randn(weight.shape, generator=generator))
    return weights


def fill_gradients(weights, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight.grad_buffer().copy_(torch.randn(weight.shape, generator=generator) * scale)


def plain_adamw(weights, gradients, rates, config):
    """The update in float64, straight from the paper, with clipping by the global norm before it."""
    values = [w.dense(dtype=torch.float32).double().numpy().copy() for w in weights]
    first, second = [np.zeros_like(v) for v in values], [np.zeros_like(v) for v in values]
    norms = []
    for step, (grads, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        norms.append(math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in grads)))
        scale = min(1.0, config.max_grad_norm / norms[-1]) if config.max_grad_norm else 1.0
        for i, weight in enumerate(weights):
            g = grads[i].astype(np.float64) * scale
            first[i] = config.beta1 * first[i] + (1 - config.beta1) * g
            second[i] = config.beta2 * second[i] + (1 - config.beta2) * g * g
            values[i] *= 1 - rate * (config.weight_decay if weight.decay else 0.0)
            update = first[i] / (1 - config.beta1**step)
            values[i] -= rate * update / (np.sqrt(second[i] / (1 - config.beta2**step)) + config.eps)
    return values, norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [OptimizerConfig(), OptimizerConfig(weight_decay=0.1, max_grad_norm=0.0)])
def test_steps_equal_the_plain_definition(config, dtype):
    weights = make_weights(dtype)
    rates = [1e-2, 2e-2, 5e-3]
    gradients = []
    for step in range(3):
        fill_gradients(weights, step)
        gradients.append([w.grad_buffer().numpy().copy() for w in weights])
        for weight in weights:
            weight.zero_grad()
    expected, norms = plain_adamw(weights, gradients, rates, config)
    optimizer = AdamW(Shares.single(weights), config)
    for step, rate in enumerate(rates):
        fill_gradients(weights, step)
        assert optimizer.step(rate) == pytest.approx(norms[step], rel=1e-6)
    for weight, value in zip(weights, expected, strict=True):
        np.testing.assert_allclose(optimizer.state[weight.name].master.numpy(), value, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compute_weight_is_its_master_rounded(dtype):
    weights = make_weights(dtype)
    optimizer = AdamW(Shares.single(weights), OptimizerConfig())
    fill_gradients(weights, 0)
    optimizer.step(1e-2)
    for weight in weights:
        master = optimizer.state[weight.name].master
        assert torch.equal(weight.dense(dtype=torch.float32), master.to(dtype).float())
        again = Weight(weight.name, weight.shape, dtype, packed=weight.name == "matrix")
        again.load_(master)
        assert torch.equal(again.data, weight.data)


def test_a_step_in_bf16_smaller_than_half_a_unit_is_kept_by_the_master():
    weights = make_weights(torch.bfloat16)
    optimizer = AdamW(Shares.single(weights), OptimizerConfig(max_grad_norm=0.0))
    before = weights[0].dense(dtype=torch.float32)
    for _ in range(50):
        for weight in weights:
            weight.grad_buffer().fill_(1.0)
        optimizer.step(1e-4)
    assert not torch.equal(weights[0].dense(dtype=torch.float32), before)
    torch.testing.assert_close(optimizer.state["matrix"].master, before - 50e-4, rtol=0, atol=1e-4)


def test_compute_weights_stay_where_they_are():
    weights = make_weights()
    addresses = [w.data.data_ptr() for w in weights]
    optimizer = AdamW(Shares.single(weights), OptimizerConfig())
    fill_gradients(weights, 0)
    optimizer.step(1e-2)
    assert [w.data.data_ptr() for w in weights] == addresses


def test_state_is_made_at_the_first_step():
    weights = make_weights()
    optimizer = AdamW(Shares.single(weights), OptimizerConfig())
    assert not optimizer.state
    fill_gradients(weights, 0)
    optimizer.step(1e-2)
    assert set(optimizer.state) == {"matrix", "vector"}


def test_a_clipped_gradient_points_where_it_did():
    """Adam divides the scale out, so clipping shows in the first moment: it is the gradient at the limit's length."""
    weights = make_weights()
    optimizer = AdamW(Shares.single(weights), OptimizerConfig(max_grad_norm=1.0))
    fill_gradients(weights, 0, scale=100.0)
    gradient = weights[0].grad_buffer().clone()
    norm = optimizer.step(1e-3)
    assert norm > 1000
    torch.testing.assert_close(optimizer.state["matrix"].exp_avg, 0.1 * gradient / norm, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_takes_no_step(bad):
    weights = make_weights()
    optimizer = AdamW(Shares.single(weights), OptimizerConfig())
    fill_gradients(weights, 0)
    optimizer.step(1e-2)
    before = [w.data.clone() for w in weights]
    fill_gradients(weights, 1)
    weights[1].grad_buffer()[3] = bad
    with pytest.raises(NumericsError, match="vector"):
        optimizer.step(1e-2)
    assert all(torch.equal(w.data, b) for w, b in zip(weights, before, strict=True))
    assert optimizer.steps == 1 and not optimizer.interrupted
    assert all((w.grad_buffer() == 0).all() for w in weights)
    fill_gradients(weights, 2)
    assert math.isfinite(optimizer.step(1e-2))


@pytest.mark.parametrize("rate", [-1.0, math.nan, math.inf])
def test_a_rate_that_cannot_be_used_is_refused(rate):
    weights = make_weights()
    fill_gradients(weights, 0)
    with pytest.raises(InputError, match="learning rate"):
        AdamW(Shares.single(weights), OptimizerConfig()).step(rate)


def test_gradients_are_zero_after_a_step():
    weights = make_weights()
    fill_gradients(weights, 0)
    AdamW(Shares.single(weights), OptimizerConfig()).step(1e-2)
    assert all((w.grad_buffer() == 0).all() for w in weights)


def test_warm_up_rises_in_a_line_to_the_base():
    assert [learning_rate(step, 8.0, warmup=4) for step in range(6)] == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]


def test_cosine_falls_from_the_base_to_the_least_ratio_and_stays():
    rates = [learning_rate(step, 1.0, 10, 110, "cosine", 0.1) for step in range(200)]
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == rates[199] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_an_unknown_schedule_names_the_nearest():
    with pytest.raises(ConfigError, match='did you mean "cosine"'):
        learning_rate(0, 1.0, kind="cosin")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"step": -1}, "step -1, "),
        ({"base": -1.0}, "base -1.0, "),
        ({"base": math.nan}, "base nan, "),
        ({"warmup": -1}, "warmup -1, "),
        ({"min_ratio": 1.5}, "min_ratio 1.5: "),
        ({"kind": "cosine"}, "a cosine schedule over 0 steps has no room"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(arguments, complaint):
    with pytest.raises(ConfigError, match=complaint):
        learning_rate(**({"step": 0, "base": 1.0} | arguments))
