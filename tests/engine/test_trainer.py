"""The trainer: what a call computes, whatever the packing; what it refuses; what it leaves behind."""

import math
from contextlib import contextmanager

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import ConfigError, EngineError, InputError, NumericsError
from engine.kernels.op import extension
from engine.losses import LossConfig
from engine.model import Transformer
from engine.trainer import Trainer
from engine.types import Sample
from tests.tiny import VOCAB_SIZE, tiny_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_trainer(dtype="float32", **config):
    model = Transformer(tiny_config(), DTYPES[dtype])
    model.initialize(0)
    return Trainer(model, EngineConfig(dtype=dtype, **config))


def make_samples(count=9, seed=0, longest=40):
    """Random tokens; a prompt of a third or so masked out; advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        length = int(torch.randint(3, longest, (), generator=generator))
        tokens = torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()
        mask = torch.zeros(length, dtype=torch.int64)
        mask[1 + length // 3 :] = 1
        advantages = torch.randn(length, generator=generator)
        samples.append(Sample(tokens=tokens, loss_mask=mask, advantages=advantages))
    return samples


def with_old_logprobs(trainer, samples, shift=0.0):
    for sample, scored in zip(samples, trainer.score([s.tokens for s in samples]), strict=True):
        sample.old_logprobs = torch.cat([torch.zeros(1), scored + shift]).clamp(max=0.0)
    return samples


def gradients(trainer):
    return [weight.grad_buffer().clone() for weight in trainer.model.weights()]


def assert_gradients_close(left, right, tolerance=2e-5):
    for a, b in zip(left, right, strict=True):
        assert float((a - b).abs().max()) <= tolerance * max(float(b.abs().max()), 1e-8)


@contextmanager
def threads(count):
    before = extension().num_threads()
    extension().set_num_threads(count)
    try:
        yield
    finally:
        extension().set_num_threads(before)


def test_logprobs_are_those_of_score_on_loss_tokens_and_nan_elsewhere():
    trainer = make_trainer()
    samples = make_samples()
    stats = trainer.forward_backward(samples, "sft")
    for sample, seen, scored in zip(samples, stats.logprobs, trainer.score([s.tokens for s in samples]), strict=True):
        trained = sample.loss_mask[1:].bool()
        assert torch.equal(seen[trained], scored[trained])
        assert seen[~trained].isnan().all()
        assert seen.dtype == torch.float32


def test_loss_equals_its_plain_definition():
    trainer = make_trainer()
    samples = make_samples()
    stats = trainer.forward_backward(samples, "reinforce")
    total, count = 0.0, 0
    for sample, scored in zip(samples, trainer.score([s.tokens for s in samples]), strict=True):
        for i, masked in enumerate(sample.loss_mask.tolist()):
            if masked:
                total -= float(sample.advantages[i]) * float(scored[i - 1])
                count += 1
    assert stats.num_loss_tokens == count
    assert stats.loss == pytest.approx(total / count, rel=1e-6)


@pytest.mark.parametrize("loss", ["sft", "dapo", "grpo", "gspo"])
def test_many_micro_batches_have_the_gradient_of_one(loss):
    one, many = make_trainer(), make_trainer(train_batch_tokens=48)
    samples = with_old_logprobs(one, make_samples(), shift=-0.1)
    whole, pieces = one.forward_backward(samples, loss), many.forward_backward(samples, loss)
    assert pieces.metrics["micro_batches"] > 2 and whole.metrics["micro_batches"] == 1
    assert pieces.loss == whole.loss  # rows do not see each other, and the sum is correctly rounded
    assert_gradients_close(gradients(many), gradients(one))


def test_the_order_of_samples_does_not_show_in_the_loss():
    trainer = make_trainer(train_batch_tokens=64)
    samples = with_old_logprobs(trainer, make_samples(), shift=-0.1)
    forwards, backwards = trainer.forward_backward(samples, "grpo"), trainer.forward_backward(samples[::-1], "grpo")
    assert forwards.loss == backwards.loss
    for left, right in zip(forwards.logprobs, reversed(backwards.logprobs), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


def test_two_calls_accumulate_the_sum_of_their_gradients():
    both, first, second = make_trainer(), make_trainer(), make_trainer()
    samples = make_samples()
    for trainer, some in ((both, samples[:4]), (both, samples[4:]), (first, samples[:4]), (second, samples[4:])):
        trainer.forward_backward(some, "sft")
    assert_gradients_close(gradients(both), [a + b for a, b in zip(gradients(first), gradients(second), strict=True)])


def test_gradient_predicts_how_the_loss_changes():
    """Along its own direction the loss rises by the gradient's norm per unit of length."""
    trainer = make_trainer()
    samples = make_samples()
    trainer.forward_backward(samples, "sft")
    weights, grads = trainer.model.weights(), gradients(trainer)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
    values = [weight.dense(dtype=torch.float32) for weight in weights]
    losses = []
    for step in (1e-2, -1e-2):
        for weight, value, grad in zip(weights, values, grads, strict=True):
            weight.load_(value + step * grad / norm)
        losses.append(trainer.forward_backward(samples, "sft").loss)
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(norm, rel=5e-3)


def test_tokens_after_the_last_loss_token_do_not_run():
    trainer = make_trainer()
    samples = [
        Sample(tokens=[5, 6, 7, 8, 9, 10], loss_mask=[0, 0, 1, 0, 0, 0]),
        Sample(tokens=[5, 6, 7], loss_mask=[0, 0, 0]),
    ]
    stats = trainer.forward_backward(samples, "sft")
    assert (stats.num_tokens, stats.num_loss_tokens) == (2, 1)
    assert stats.logprobs[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_policy_the_difference_is_exactly_zero_and_the_ratio_one(dtype):
    trainer = make_trainer(dtype)
    samples = with_old_logprobs(trainer, make_samples())
    stats = trainer.forward_backward(samples, "dapo")
    assert stats.max_abs_logprob_difference == 0.0
    assert stats.metrics["ratio_mean"] == stats.metrics["ratio_max"] == 1.0
    assert stats.metrics["clip_fraction"] == stats.metrics["kl_old"] == 0.0


def test_one_bit_of_difference_is_reported():
    trainer = make_trainer()
    samples = with_old_logprobs(trainer, make_samples())
    old = samples[3].old_logprobs
    near = torch.nextafter(old[-1], torch.tensor(-math.inf))
    difference = float((old[-1] - near).abs())
    old[-1] = near
    assert trainer.forward_backward(samples, "dapo").max_abs_logprob_difference == difference > 0.0


def test_without_old_logprobs_there_is_no_difference_to_report():
    assert make_trainer().forward_backward(make_samples(), "sft").max_abs_logprob_difference is None


def test_each_sample_is_trained_at_its_own_temperature():
    trainer = make_trainer()
    samples = make_samples(3)
    for sample, temperature in zip(samples, (0.7, 1.0, 0.0), strict=True):
        sample.temperature = temperature
    stats = trainer.forward_backward(samples, "sft")
    for sample, seen, temperature in zip(samples, stats.logprobs, (0.7, 1.0, 1.0), strict=True):
        scored = trainer.score([sample.tokens], temperature)[0]
        trained = sample.loss_mask[1:].bool()
        assert torch.equal(seen[trained], scored[trained])


def test_score_does_not_depend_on_the_micro_batches():
    sequences = [sample.tokens for sample in make_samples()] + [[3]]
    whole, pieces = make_trainer().score(sequences), make_trainer(train_batch_tokens=30).score(sequences)
    assert [len(s) for s in whole] == [len(s) - 1 for s in sequences]
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))


def test_a_function_of_ones_own_equals_the_named_loss_it_spells_out():
    named, own = make_trainer(), make_trainer()
    samples = make_samples()
    expected = named.forward_backward(samples, "reinforce")
    assert own.forward_backward(samples, lambda b: -b.advantages * b.logprobs).loss == expected.loss
    assert all(torch.equal(a, b) for a, b in zip(gradients(own), gradients(named), strict=True))


def test_a_function_of_ones_own_finds_its_tokens_in_the_samples():
    samples = make_samples(4)
    for sample in samples:
        sample.extra["weight"] = torch.rand(len(sample.tokens))

    def weighted(batch):
        at = zip(batch.sequence_ids.tolist(), batch.positions.tolist(), strict=True)
        return -batch.logprobs * torch.stack([batch.samples[s].extra["weight"][i] for s, i in at])

    own, named = make_trainer(train_batch_tokens=40), make_trainer(train_batch_tokens=40)
    loss = own.forward_backward(samples, weighted).loss
    for sample in samples:
        sample.advantages = sample.extra["weight"]
    assert named.forward_backward(samples, "reinforce").loss == pytest.approx(loss, rel=1e-6)


def test_entropy_bonus_alone_raises_the_entropy():
    trainer = make_trainer()
    samples = make_samples()
    for sample in samples:
        sample.advantages = 0.0
    seen = []
    for _ in range(4):
        stats = trainer.forward_backward(samples, LossConfig(name="reinforce", entropy_coefficient=1.0))
        seen.append(stats.metrics["entropy"])
        trainer.optim_step(1e-3)
    assert seen == sorted(seen) and seen[-1] > seen[0]


def test_training_learns_the_samples():
    trainer = make_trainer("bfloat16")
    samples = make_samples(4)
    losses = []
    for _ in range(30):
        losses.append(trainer.forward_backward(samples, "sft").loss)
        trainer.optim_step(1e-2)
    assert losses[-1] < 0.5 * losses[0]


def test_a_step_raises_the_weight_version_and_staleness_counts_from_it():
    trainer = make_trainer()
    samples = make_samples(3)
    for sample in samples:
        sample.weight_version = 0
    assert trainer.forward_backward(samples, "sft").metrics["max_staleness"] == 0.0
    assert trainer.optim_step(1e-3).weight_version == trainer.weight_version == 1
    assert trainer.forward_backward(samples, "sft").metrics["max_staleness"] == 1.0


def train_ten_steps(dtype, **config):
    trainer = make_trainer(dtype, train_batch_tokens=64, **config)
    norms = []
    for step in range(10):
        samples = with_old_logprobs(trainer, make_samples(6, seed=step), shift=-0.05)
        trainer.forward_backward(samples, "grpo")
        norms.append(trainer.optim_step(1e-3).grad_norm)
    return norms, [weight.data.clone() for weight in trainer.model.weights()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_ten_steps_have_the_same_bits_again_and_on_any_number_of_threads(dtype):
    with threads(2):
        norms, weights = train_ten_steps(dtype)
        again = train_ten_steps(dtype)
    with threads(1):
        alone = train_ten_steps(dtype)
    for other_norms, other_weights in (again, alone):
        assert other_norms == norms
        assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_checkpointing_gives_the_same_gradients_to_the_bit(dtype):
    kept, recomputed = make_trainer(dtype), make_trainer(dtype, activation_checkpointing=True)
    assert recomputed.model.checkpointing
    samples = make_samples()
    assert kept.forward_backward(samples, "sft").loss == recomputed.forward_backward(samples, "sft").loss
    assert all(torch.equal(a, b) for a, b in zip(gradients(kept), gradients(recomputed), strict=True))


GOOD = {"tokens": [1, 2, 3], "loss_mask": [0, 1, 1], "old_logprobs": [0.0, -1.0, -1.0]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": []}, "has no tokens"),
        ({"tokens": [1, 2, VOCAB_SIZE]}, f"token id {VOCAB_SIZE}; the vocabulary is 0 to {VOCAB_SIZE - 1}"),
        ({"tokens": [1, -2, 3]}, "token id -2"),
        ({"tokens": [1.0, 2.0, 3.0]}, "whole numbers"),
        ({"tokens": [1, 2, "x"]}, "not a list of numbers"),
        ({"tokens": [0] * 513, "loss_mask": [0] + [1] * 512, "old_logprobs": None}, "context is 512"),
        ({"loss_mask": [0, 1]}, r"loss_mask has shape \(2,\), but there are 3 tokens"),
        ({"loss_mask": [1, 1, 1]}, r"loss_mask\[0\] is 1"),
        ({"loss_mask": [0, 1, 2]}, "other than 0 and 1"),
        ({"loss_mask": [0, 0, 0]}, "nothing to train"),
        ({"advantages": [1.0, 2.0]}, "advantages has shape"),
        ({"advantages": math.nan}, "must be finite"),
        ({"old_logprobs": None}, 'has no old_logprobs, which the loss "dapo" needs'),
        ({"old_logprobs": [0.0, -1.0]}, "old_logprobs has shape"),
        ({"old_logprobs": [0.0, -1.0, -math.inf]}, r"old_logprobs\[2\] is -inf"),
        ({"old_logprobs": [0.0, 1.0, -1.0]}, "at most 0"),
        ({"ref_logprobs": [0.0]}, "ref_logprobs has shape"),
        ({"temperature": -1.0}, "temperature is -1.0"),
    ],
)
def test_a_bad_sample_is_refused_and_what_was_accumulated_stays(change, message):
    trainer = make_trainer()
    good = Sample(**GOOD)
    trainer.forward_backward([good], "dapo")
    before = gradients(trainer)
    with pytest.raises(InputError, match=message):
        # Only where there is nothing else to train on is a sample without loss tokens an error.
        trainer.forward_backward([Sample(**(GOOD | change))], "dapo")
    assert all(torch.equal(a, b) for a, b in zip(gradients(trainer), before, strict=True))
    assert trainer.optim_step(1e-3).weight_version == 1


def test_a_kl_term_needs_reference_logprobs():
    with pytest.raises(InputError, match="has no ref_logprobs"):
        make_trainer().forward_backward([Sample(**GOOD)], LossConfig(name="dapo", kl_coefficient=0.1))


def test_no_samples_and_unknown_losses_are_refused():
    trainer = make_trainer()
    with pytest.raises(InputError, match="no samples"):
        trainer.forward_backward([], "sft")
    with pytest.raises(ConfigError, match="there is no loss"):
        trainer.forward_backward([Sample(**GOOD)], "stf")


@pytest.mark.parametrize(
    ("sequences", "temperature", "complaint"),
    [
        ([[]], 1.0, "sequence 0 has no tokens"),
        ([[1, VOCAB_SIZE]], 1.0, f"sequence 0 holds token id {VOCAB_SIZE}"),
        ([[1] * 513], 1.0, "sequence 0 has 513 tokens; the model's context is 512"),
        ([[1, 2]], math.nan, "temperature is nan"),
    ],
)
def test_score_refuses_what_it_cannot_take(sequences, temperature, complaint):
    with pytest.raises(InputError, match=complaint):
        make_trainer().score(sequences, temperature)


def test_a_step_without_a_gradient_is_refused():
    trainer = make_trainer()
    with pytest.raises(InputError, match="no gradient"):
        trainer.optim_step(1e-3)
    trainer.forward_backward([Sample(**GOOD)], "sft")
    trainer.optim_step(1e-3)
    with pytest.raises(InputError, match="no gradient"):
        trainer.optim_step(1e-3)


def test_weights_that_are_not_finite_raise_and_leave_no_gradient():
    trainer = make_trainer()
    trainer.forward_backward([Sample(**GOOD)], "sft")
    norm = trainer.model.norm
    good = norm.dense(dtype=torch.float32)
    norm.load_(torch.full_like(good, math.nan))
    with pytest.raises(NumericsError, match="check the weights"):
        trainer.forward_backward([Sample(**GOOD)], "sft")
    assert all((g == 0).all() for g in gradients(trainer))
    norm.load_(good)
    trainer.forward_backward([Sample(**GOOD)], "sft")
    assert math.isfinite(trainer.optim_step(1e-3).grad_norm)


def test_an_interrupt_between_micro_batches_leaves_no_half_gradient():
    trainer = make_trainer(train_batch_tokens=32)
    calls = []

    def interrupted(batch):
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return -batch.logprobs

    with pytest.raises(KeyboardInterrupt):
        trainer.forward_backward(make_samples(), interrupted)
    assert all((g == 0).all() for g in gradients(trainer))
    with pytest.raises(InputError, match="no gradient"):
        trainer.optim_step(1e-3)


def test_after_an_interrupted_step_only_loading_a_state_helps(monkeypatch):
    trainer = make_trainer()
    trainer.forward_backward([Sample(**GOOD)], "sft")

    def interrupt(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("engine.optim.adamw_", interrupt)
        trainer.optim_step(1e-3)
    with pytest.raises(EngineError, match="load a saved state"):
        trainer.optim_step(1e-3)


def test_forward_backward_works_inside_inference_mode():
    outside, inside = make_trainer(), make_trainer()
    samples = make_samples(3)
    outside.forward_backward(samples, "sft")
    with torch.inference_mode():
        inside.forward_backward(samples, "sft")
    assert all(torch.equal(a, b) for a, b in zip(gradients(inside), gradients(outside), strict=True))


def test_torch_has_its_threads_back_after_a_call_and_after_an_error():
    trainer = make_trainer()
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        seen = []
        trainer.forward_backward([Sample(**GOOD)], lambda b: (seen.append(torch.get_num_threads()), -b.logprobs)[1])
        with pytest.raises(InputError):
            trainer.forward_backward([], "sft")
        assert (seen, torch.get_num_threads()) == ([1], 3)
    finally:
        torch.set_num_threads(before)
