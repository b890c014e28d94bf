"""A vocabulary in shards: what ranks exchange, fold and differentiate equals the whole row."""

import math

import pytest
import torch

from engine.errors import InputError
from engine.kernels.op import use_isa
from engine.kernels.shard_logprob import fold_statistics, shard_logprob_backward, shard_statistics, shard_targets
from engine.kernels.token_logprob import TOKEN_LOGPROB, Upstream, logits_logprob
from tests.kernels.cases import (
    ISAS,
    assert_near,
    code_path,
    exact_logprobs,
    grad_of,
    ids,
    needs_cpu,
    randn,
    threads,
    warmth,
    weight_of,
)
from tests.row_invariance import assert_row_invariant, assert_same_bits

pytestmark = needs_cpu

INF = math.inf


def ranges(vocab, shards):
    """Shards as even as whole panels of 16 allow; the last is what is left."""
    width = -(-vocab // shards // 16) * 16 if vocab > 16 * shards else -(-vocab // shards)
    return [(first, min(vocab, first + width)) for first in range(0, vocab, width)]


def statistics_of(logits, targets, inverse, shards):
    """[p, R, 3 + n], each shard's from its own columns alone."""
    return torch.stack(
        [
            shard_statistics(logits[:, a:b].contiguous(), shard_targets(targets, a, b - a), inverse)
            for a, b in ranges(logits.shape[1], shards)
        ]
    )


@pytest.mark.parametrize("vocab", [1, 7, 256, 257, 1000, 5003])
@pytest.mark.parametrize("isa", ISAS)
def test_one_shard_equals_the_unsharded_kernel_bitwise(isa, vocab):
    logits, targets, inverse = randn(33, vocab, scale=4), ids((33, 3), vocab), warmth(33)
    logits[::5, vocab // 2] = -INF
    with use_isa(isa):
        whole = TOKEN_LOGPROB["forward", logits](logits, targets, inverse)
        folded = fold_statistics(statistics_of(logits, targets, inverse, 1))
    for name, one, other in zip(("log-probabilities", "entropy", "stats"), folded, whole, strict=True):
        assert_same_bits(one, other, name)


@pytest.mark.parametrize("poison", [math.nan, INF, -INF])
@pytest.mark.parametrize("isa", ISAS)
def test_one_shard_of_a_row_that_is_not_finite_equals_the_unsharded_kernel_bitwise(isa, poison):
    logits, targets = randn(5, 700), ids((5, 2), 700)
    logits[0, 699], logits[1, 0], logits[2], logits[3, 256:512] = poison, poison, poison, poison
    with use_isa(isa):
        whole = TOKEN_LOGPROB["forward", logits](logits, targets, None)
        folded = fold_statistics(statistics_of(logits, targets, None, 1))
    assert whole[0].isnan()[:4].any()
    for name, one, other in zip(("log-probabilities", "entropy", "stats"), folded, whole, strict=True):
        assert_same_bits(one, other, name)


@pytest.mark.parametrize("shards", [2, 3, 8])
@pytest.mark.parametrize("isa", [*ISAS, "torch"])
def test_shards_match_float64_log_softmax(isa, shards):
    logits, targets, inverse = randn(9, 1003, scale=4), ids((9, 4), 1003), warmth(9)
    with code_path(isa):
        logprobs, entropy, stats = fold_statistics(statistics_of(logits, targets, inverse, shards))
    expected, expected_entropy = exact_logprobs(logits, targets, inverse)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(stats[:, 0], (logits * inverse[:, None]).amax(1))


@pytest.mark.parametrize("isa", [*ISAS, "torch"])
def test_a_shard_without_mass_changes_no_bit(isa):
    logits, targets = randn(6, 400, scale=4), ids((6, 2), 400)
    nothing = torch.full((6, 300), -INF)
    with code_path(isa):
        alone = fold_statistics(statistics_of(logits, targets, None, 1))
        other = shard_statistics(nothing, torch.full((6, 2), -1, dtype=torch.int32))
        for order in ((0, 1), (1, 0)):
            shards = [statistics_of(logits, targets, None, 1)[0], other]
            folded = fold_statistics(torch.stack([shards[i] for i in order]))
            for one, both in zip(alone, folded, strict=True):
                assert_same_bits(both, one, f"order {order}")


@pytest.mark.parametrize("isa", [*ISAS, "torch"])
def test_a_token_of_probability_zero_is_minus_infinity_in_whatever_shard(isa):
    logits = randn(2, 700)
    logits[0, 3], logits[1, 350:] = -INF, -INF
    targets = torch.tensor([[3], [600]], dtype=torch.int32)
    with code_path(isa):
        logprobs, entropy, _ = fold_statistics(statistics_of(logits, targets, None, 2))
    assert logprobs.flatten().tolist() == [-INF, -INF]
    assert entropy.isfinite().all()


@pytest.mark.parametrize("poison", [math.nan, INF])
@pytest.mark.parametrize("isa", [*ISAS, "torch"])
def test_a_poisoned_shard_makes_the_whole_row_nan(isa, poison):
    logits, targets = randn(5, 700), torch.tensor([[0], [5], [690], [690], [3]], dtype=torch.int32)
    logits[0, 699], logits[1, 0] = poison, poison
    logits[2, :350], logits[2, 7] = -INF, poison  # beside nothing but -inf
    logits[3] = -INF
    with code_path(isa):
        logprobs, entropy, _ = fold_statistics(statistics_of(logits, targets, None, 2))
    assert logprobs.flatten().isnan().tolist() == [True, True, True, True, False]
    assert entropy.isnan().tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("isa", ISAS)
def test_statistics_and_fold_are_row_invariant(isa):
    def op(rows):
        targets = rows[:, 601:603].abs().mul(5).int()
        logprobs, entropy, stats = fold_statistics(
            statistics_of(rows[:, :601].contiguous(), targets, rows[:, 603].abs() + 0.5, 3)
        )
        return torch.cat([logprobs, entropy[:, None], stats], 1)

    with use_isa(isa):
        assert_row_invariant(op, randn(37, 604))


def test_bits_do_not_depend_on_threads():
    logits, targets, inverse = randn(200, 5003), ids((200, 2), 5003), warmth(200)
    results = []
    for count in (1, 2):
        with threads(count):
            results.append(fold_statistics(statistics_of(logits, targets, inverse, 4)))
    for one, two in zip(*results, strict=True):
        assert_same_bits(one, two, "1 and 2 threads")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("isa", [*ISAS, "torch"])
def test_gradients_of_shards_match_float64_autograd_of_the_whole_row(isa, shards, dtype):
    rows, vocab = 41, 301
    logits, targets, inverse = randn(rows, vocab, scale=2), ids((rows,), vocab), warmth(rows)
    logits[::7, 5] = -INF
    targets[::7] = 9
    g, h = randn(rows), randn(rows, seed=1)
    wide = logits.clamp_min(-1e4).double().requires_grad_()  # autograd makes NaN of -inf
    exact, exact_entropy = exact_logprobs(wide, targets[:, None], inverse)
    (exact[:, 0] @ g.double() + exact_entropy @ h.double()).backward()
    with code_path(isa):
        _, entropy, stats = fold_statistics(statistics_of(logits, targets[:, None], inverse, shards))
        parts = [
            shard_logprob_backward(
                logits[:, a:b].clone(), shard_targets(targets, a, b - a), inverse, stats, entropy, g, h, dtype
            )
            for a, b in ranges(vocab, shards)
        ]
    assert_near(torch.cat(parts, 1), grad_of(wide), dtype, ulps=2 if dtype == torch.bfloat16 else 32)


@pytest.mark.parametrize("isa", ISAS)
def test_the_gradient_of_one_shard_equals_the_unsharded_kernel_bitwise(isa):
    rows, vocab, width = 20, 301, 24
    head, hidden, targets = (
        weight_of(randn(vocab, width), torch.float32, packed=True),
        randn(rows, width),
        ids((rows,), vocab),
    )
    logits, g, h = hidden @ head.dense().T, randn(rows), randn(rows, seed=1)
    with use_isa(isa):
        _, entropy, stats = TOKEN_LOGPROB["forward", logits](logits, targets[:, None], None)
        given = Upstream(targets, None, stats, entropy, g, h)
        whole = TOKEN_LOGPROB["backward", logits](logits.clone(), given, torch.float32)
        _, entropy, stats = fold_statistics(statistics_of(logits, targets[:, None], None, 1))
        shard = shard_logprob_backward(logits.clone(), targets, None, stats, entropy, g, h, torch.float32)
    assert_same_bits(shard, whole, "gradient")


def test_statistics_without_targets_are_three_columns():
    statistics = shard_statistics(randn(4, 99), torch.empty((4, 0), dtype=torch.int32))
    assert statistics.shape == (4, 3)
    logprobs, entropy, _ = fold_statistics(statistics[None])
    assert logprobs.shape == (4, 0)
    assert_same_bits(entropy, logits_logprob(randn(4, 99), torch.zeros(4, dtype=torch.int32))[1], "entropy")


def test_targets_become_columns_of_the_shard():
    tokens = torch.tensor([[0, 31], [32, 47], [48, 99]], dtype=torch.int32)
    assert shard_targets(tokens, 32, 16).tolist() == [[-1, -1], [0, 15], [-1, -1]]


@pytest.mark.parametrize("bad", [-2, 99])
def test_a_target_outside_the_shard_is_refused(bad):
    with pytest.raises(InputError, match=f"target {bad} of row 1 .* 99 columns"):
        shard_statistics(torch.zeros(2, 99), torch.tensor([[-1], [bad]], dtype=torch.int32))


def test_statistics_of_another_shape_are_refused():
    with pytest.raises(InputError, match="3 \\+ targets"):
        fold_statistics(torch.zeros(2, 4, 2, dtype=torch.float64))
