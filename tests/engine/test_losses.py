"""Losses: each against a definition in plain numpy, token by token, and against its numerical gradient."""

import math

import numpy as np
import pytest
import torch

from engine.config import parse
from engine.errors import ConfigError, InputError
from engine.losses import LOSSES, Loss, LossBatch, LossConfig, LossMetrics, kl_divergence
from engine.types import Sample

COUNTS = [7, 1, 9, 4]  # loss tokens of each sample


def make_batch(seed=0, spread=0.5, counts=COUNTS, dtype=torch.float64):
    """Old log-probabilities between -3 and -0.05, new ones `spread` around them, advantages of both signs and 0."""
    rng = np.random.default_rng(seed)
    n = sum(counts)
    old = -rng.uniform(0.05, 3.0, n)
    new = np.minimum(old + rng.normal(0.0, spread, n), -1e-3)
    advantages = rng.normal(0.0, 1.0, n)
    advantages[::6] = 0.0
    cu_seqlens = torch.tensor([0, *np.cumsum(counts)])
    return LossBatch(
        logprobs=torch.tensor(new, dtype=dtype).requires_grad_(),
        entropy=torch.tensor(rng.uniform(0.1, 2.0, n), dtype=dtype).requires_grad_(),
        advantages=torch.tensor(advantages, dtype=dtype),
        old_logprobs=torch.tensor(old, dtype=dtype),
        ref_logprobs=torch.tensor(old + rng.normal(0.0, 0.3, n), dtype=dtype),
        positions=torch.cat([torch.arange(count) + 1 for count in counts]),
        sequence_ids=torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)),
        cu_seqlens=cu_seqlens,
        samples=[Sample(tokens=[0] * (count + 1), loss_mask=[0] + [1] * count) for count in counts],
        num_loss_tokens=n,
        num_loss_samples=len(counts),
    )


def clip(x, low, high):
    return min(max(x, low), high)


def plain_clipped(r, a, low, high, c):
    loss = -min(r * a, clip(r, 1 - low, 1 + high) * a)
    return min(loss, -c * a) if a < 0 and c else loss


# Each definition: (log pi, log pi held fixed, log mu, advantage, the sample's mean of log r held fixed) -> loss.
# What a formula puts under a stop-gradient it computes from the fixed values, so differences in log pi miss it too.
PLAIN = {
    "sft": lambda lp, fixed, mu, a, mean: -lp,
    "reinforce": lambda lp, fixed, mu, a, mean: -a * lp,
    "ppo_clip": lambda lp, fixed, mu, a, mean: plain_clipped(math.exp(lp - mu), a, 0.2, 0.2, 3.0),
    "grpo": lambda lp, fixed, mu, a, mean: plain_clipped(math.exp(lp - mu), a, 0.2, 0.2, 3.0),
    "dapo": lambda lp, fixed, mu, a, mean: plain_clipped(math.exp(lp - mu), a, 0.2, 0.28, 3.0),
    "gspo": lambda lp, fixed, mu, a, mean: plain_clipped(math.exp(mean) * math.exp(lp - fixed), a, 3e-4, 4e-4, 0.0),
    "cispo": lambda lp, fixed, mu, a, mean: -clip(math.exp(fixed - mu), 0.0, 5.0) * a * lp,
    "sapo": lambda lp, fixed, mu, a, mean: (
        -4.0 / (t := 1.0 if a > 0 else 1.05) / (1.0 + math.exp(-t * (math.exp(lp - mu) - 1.0))) * a
    ),
    "dppo": lambda lp, fixed, mu, a, mean: (
        0.0
        if (a > 0 and math.exp(fixed) - math.exp(mu) > 0.2) or (a <= 0 and math.exp(fixed) - math.exp(mu) < -0.2)
        else -math.exp(lp - mu) * a + 1e-3 * (lp - mu) ** 2
    ),
}


def plain_losses(name, batch, logprobs):
    fixed, mu, advantages = (t.detach().numpy() for t in (batch.logprobs, batch.old_logprobs, batch.advantages))
    losses = []
    for s in range(len(batch.cu_seqlens) - 1):
        rows = range(int(batch.cu_seqlens[s]), int(batch.cu_seqlens[s + 1]))
        mean = sum(fixed[i] - mu[i] for i in rows) / len(rows)
        losses += [PLAIN[name](logprobs[i], fixed[i], mu[i], advantages[i], mean) for i in rows]
    return np.array(losses)


def test_every_named_loss_has_a_plain_definition():
    assert set(PLAIN) == set(LOSSES)


@pytest.mark.parametrize("spread", [0.0, 0.003, 0.5, 2.0])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_equals_its_plain_definition(name, spread):
    batch = make_batch(spread=spread)
    losses, _ = Loss(name).per_token(batch)
    np.testing.assert_allclose(losses.detach().numpy(), plain_losses(name, batch, batch.logprobs.detach().numpy()),
                               rtol=1e-12, atol=1e-12)  # fmt: skip


@pytest.mark.parametrize("spread", [0.003, 0.5, 2.0])
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_equals_the_difference_quotient(name, spread):
    batch = make_batch(spread=spread)
    losses, _ = Loss(name).per_token(batch)
    (gradient,) = torch.autograd.grad(losses.sum(), batch.logprobs)
    base, h = batch.logprobs.detach().numpy(), 1e-6
    quotient = (plain_losses(name, batch, base + h) - plain_losses(name, batch, base - h)) / (2 * h)
    np.testing.assert_allclose(gradient.numpy(), quotient, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("sft", "dppo")])
def test_on_policy_gradient_is_the_policy_gradient(name):
    batch = make_batch(spread=0.0)
    losses, _ = Loss(name).per_token(batch)
    (gradient,) = torch.autograd.grad(losses.sum(), batch.logprobs)
    torch.testing.assert_close(gradient, -batch.advantages, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "dppo"])
def test_a_policy_that_moved_very_far_still_gives_a_finite_gradient(name):
    batch = make_batch(dtype=torch.float32)
    batch.logprobs = (batch.logprobs.detach() * 0).requires_grad_()
    batch.old_logprobs = batch.old_logprobs - 1000.0
    losses, _ = Loss(name).per_token(batch)
    (gradient,) = torch.autograd.grad(losses.sum(), batch.logprobs)
    assert losses.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize(
    ("estimator", "plain"), [("k1", lambda d: -d), ("k2", lambda d: d * d / 2), ("k3", lambda d: np.exp(d) - d - 1)]
)
def test_kl_term_equals_its_plain_definition_and_difference_quotient(estimator, plain):
    batch = make_batch()
    config = LossConfig(name="reinforce", kl_coefficient=0.3, kl_estimator=estimator)
    with_term, _ = Loss(config).per_token(batch)
    without, _ = Loss("reinforce").per_token(batch)
    (gradient,) = torch.autograd.grad((with_term - without).sum(), batch.logprobs)
    d, h = (batch.ref_logprobs - batch.logprobs.detach()).numpy(), 1e-6
    np.testing.assert_allclose((with_term - without).detach().numpy(), 0.3 * plain(d), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(gradient.numpy(), 0.3 * (plain(d - h) - plain(d + h)) / (2 * h), rtol=1e-6, atol=1e-8)


def test_entropy_bonus_subtracts_the_entropy():
    batch = make_batch()
    losses, _ = Loss(LossConfig(name="reinforce", entropy_coefficient=0.25)).per_token(batch)
    (gradient,) = torch.autograd.grad(losses.sum(), batch.entropy)
    torch.testing.assert_close(losses + batch.advantages * batch.logprobs, -0.25 * batch.entropy)
    torch.testing.assert_close(gradient, torch.full_like(gradient, -0.25))


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_aggregation_equals_its_plain_definition(aggregation):
    batch = make_batch()
    loss = Loss(LossConfig(name="sft", aggregation=aggregation, constant_length=32))
    per_token = np.arange(float(sum(COUNTS))) + 1.0
    total = float((loss.token_weights(batch).numpy() * per_token).sum())
    samples = np.split(per_token, np.cumsum(COUNTS)[:-1])
    expected = {
        "token": sum(s.sum() for s in samples) / sum(COUNTS),
        "sequence": np.mean([s.mean() for s in samples]),
        "constant": sum(s.sum() for s in samples) / (len(COUNTS) * 32),
    }[aggregation]
    assert total == pytest.approx(expected, rel=1e-12)


def test_weights_count_the_whole_call_and_not_the_micro_batch():
    batch = make_batch()
    batch.num_loss_tokens, batch.num_loss_samples = 100, 10
    assert Loss("dapo").token_weights(batch)[0] == 1 / 100
    assert Loss("grpo").token_weights(batch)[0] == pytest.approx(1 / (10 * COUNTS[0]))


def test_metrics_equal_their_plain_definitions_over_two_micro_batches():
    batches = [make_batch(seed=1), make_batch(seed=2, counts=[3, 5])]
    metrics = LossMetrics()
    ratios, cut, kl_old, kl_ref, entropy = [], [], [], [], []
    for batch in batches:
        metrics.add(batch, Loss("dapo").per_token(batch)[1])
        new, old, ref = (t.detach().numpy() for t in (batch.logprobs, batch.old_logprobs, batch.ref_logprobs))
        r, a = np.exp(new - old), batch.advantages.numpy()
        ratios += list(r)
        cut += list(((a > 0) & (r > 1.28)) | ((a < 0) & (r < 0.8)) | ((a < 0) & (r > 3.0)))
        kl_old += list(r - np.log(r) - 1)
        kl_ref += list(np.exp(ref - new) - (ref - new) - 1)
        entropy += list(batch.entropy.detach().numpy())
    result = metrics.result()
    assert 0.0 < result["clip_fraction"] < 1.0
    expected = {"ratio_mean": np.mean(ratios), "ratio_max": np.max(ratios), "clip_fraction": np.mean(cut),
                "kl_old": np.mean(kl_old), "kl_ref": np.mean(kl_ref), "entropy": np.mean(entropy)}  # fmt: skip
    assert result == pytest.approx(expected, rel=1e-9)


def test_merged_metrics_do_not_show_who_saw_what():
    batches = [make_batch(seed=seed, counts=[3, 5 + seed]) for seed in range(5)]

    def gathered(*groups):
        parts = []
        for group in groups:
            parts.append(LossMetrics())
            for index in group:
                parts[-1].add(batches[index], Loss("dapo").per_token(batches[index])[1])
        for other in parts[1:]:
            parts[0].merge(other)
        return parts[0].result()

    assert gathered([0, 1, 2, 3, 4]) == gathered([3], [1, 4], [], [0, 2]) == gathered([4, 3, 2], [1, 0])


def test_metrics_leave_out_what_was_not_given():
    batch = make_batch()
    batch.old_logprobs = torch.full_like(batch.old_logprobs, math.nan)
    batch.ref_logprobs = torch.full_like(batch.ref_logprobs, math.nan)
    metrics = LossMetrics()
    metrics.add(batch, None)
    assert set(metrics.result()) == {"entropy"}


def test_kl_of_equal_policies_is_exactly_zero():
    logprobs = make_batch().logprobs.detach()
    for estimator in ("k1", "k2", "k3"):
        assert (kl_divergence(logprobs, logprobs, estimator) == 0).all()


def test_a_function_of_ones_own_sees_the_batch():
    batch = make_batch()
    losses, cut = Loss(lambda b: b.logprobs * b.positions).per_token(batch)
    torch.testing.assert_close(losses, batch.logprobs * batch.positions)
    assert cut is None


@pytest.mark.parametrize(
    "function",
    [lambda b: b.logprobs.sum(), lambda b: b.logprobs.detach(), lambda b: 1.0],
    ids=["scalar", "detached", "float"],
)
def test_a_function_that_returns_no_loss_per_token_is_refused(function):
    with pytest.raises(InputError, match="one loss per token"):
        Loss(function).per_token(make_batch())


def test_an_unknown_loss_names_the_nearest():
    with pytest.raises(ConfigError, match='did you mean "dapo"'):
        Loss("daapo")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"name": "grpo", "tau_positive": 1.0}, "has no effect"),
        ({"name": "grpo", "clip_low": -0.1}, "0 or more"),
        ({"name": "grpo", "clip_high": math.nan}, "finite"),
        ({"name": "sapo", "tau_negative": 0.0}, "above 0"),
        ({"name": "grpo", "aggregation": "mean"}, "there are token"),
        ({"name": "grpo", "aggregation": "constant"}, "constant_length"),
        ({"name": "grpo", "kl_estimator": "k4"}, "there are k1"),
        ({"name": "grpo", "kl_coefficient": math.inf}, "finite"),
    ],
)
def test_a_parameter_that_cannot_be_used_is_refused(parameters, message):
    with pytest.raises(ConfigError, match=message):
        LossConfig(**parameters)


def test_a_loss_config_parses_from_a_table_and_fills_in_defaults():
    config = parse(LossConfig, {"name": "dapo", "clip_high": 0.3})
    assert (config.clip_low, config.clip_high, config.aggregation) == (0.2, 0.3, "token")


def test_something_that_is_no_loss_is_refused():
    with pytest.raises(ConfigError, match="a loss is a name"):
        Loss(3)
