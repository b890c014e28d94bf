"""A vocabulary in shards: what ranks exchange, fold and differentiate equals the whole row."""

import math

import pytest
import torch

from engine.kernels.op import use_backend
from engine.kernels.shard_logprob import fold_statistics, shard_logprob_backward, shard_statistics, shard_targets
from engine.kernels.token_logprob import TOKEN_LOGPROB
from tests.kernels.cases import assert_near, exact_logprobs, grad_of, ids, randn, warmth
from tests.kernels.triton.cases import DEVICE, PADDING, needs_triton
from tests.row_invariance import assert_row_invariant, assert_same_bits

# The interpreter computes with numpy, which warns of the NaN that some tests are about.
pytestmark = [needs_triton, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
INF = math.inf
VOCAB = 5000
CUTS = {1: (0, VOCAB), 3: (0, 4500, 4502, VOCAB)}  # over a tile, within one, and to the end


def shards_of(count):
    return list(zip(CUTS[count], CUTS[count][1:], strict=False))


def statistics_of(logits, targets, inverse, count):
    """[p, R, 3 + n], each shard's from its own columns alone."""
    return torch.stack(
        [
            shard_statistics(logits[:, a:b].contiguous(), shard_targets(targets, a, b - a), inverse)
            for a, b in shards_of(count)
        ]
    )


@pytest.mark.parametrize("poison", [None, math.nan, INF, -INF])
def test_one_shard_equals_the_unsharded_kernel_bitwise(poison):
    logits, targets, inverse = randn(5, VOCAB, scale=4).to(DEVICE), ids((5, 3), VOCAB).to(DEVICE), warmth(5).to(DEVICE)
    if poison is not None:
        logits[0, 4999], logits[1, 0], logits[2], logits[3, :4096] = poison, poison, poison, poison
    with use_backend("triton"):
        whole = TOKEN_LOGPROB["forward", logits](logits, targets, inverse)
        folded = fold_statistics(statistics_of(logits, targets, inverse, 1))
    assert poison is None or whole[0].isnan().any()
    for name, one, other in zip(("log-probabilities", "entropy", "stats"), folded, whole, strict=True):
        assert_same_bits(one, other, name)


def test_shards_match_log_softmax_in_double():
    logits, targets, inverse = randn(4, VOCAB, scale=4).to(DEVICE), ids((4, 20), VOCAB).to(DEVICE), warmth(4).to(DEVICE)
    with use_backend("triton"):
        logprobs, entropy, stats = fold_statistics(statistics_of(logits, targets, inverse, 3))
    expected, expected_entropy = exact_logprobs(logits, targets, inverse)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(stats[:, 0], (logits * inverse[:, None]).amax(1))


def test_a_shard_without_mass_changes_no_bit():
    logits, targets = randn(3, VOCAB, scale=4).to(DEVICE), ids((3, 2), VOCAB).to(DEVICE)
    nothing, elsewhere = torch.full((3, 300), -INF, device=DEVICE), torch.full_like(targets, -1)
    with use_backend("triton"):
        shards = [statistics_of(logits, targets, None, 1)[0], shard_statistics(nothing, elsewhere)]
        alone = fold_statistics(shards[0][None])
        for order in ((0, 1), (1, 0)):
            folded = fold_statistics(torch.stack([shards[i] for i in order]))
            for one, both in zip(alone, folded, strict=True):
                assert_same_bits(both, one, f"order {order}")


@pytest.mark.parametrize("poison", [math.nan, INF])
def test_a_poisoned_shard_makes_the_whole_row_nan(poison):
    logits, targets = randn(4, VOCAB).to(DEVICE), ids((4, 1), VOCAB).to(DEVICE)
    logits[0, 4999], logits[1, 0] = poison, poison
    logits[2, :4500], logits[2, 7] = -INF, poison  # beside nothing but -inf
    with use_backend("triton"):
        logprobs, entropy, _ = fold_statistics(statistics_of(logits, targets, None, 3))
    assert logprobs.flatten().isnan().tolist() == [True, True, True, False]
    assert entropy.isnan().tolist() == [True, True, True, False]


def test_statistics_and_fold_are_row_invariant():
    def op(rows):
        targets, inverse = rows[:, 41:42].abs().mul(5).int(), rows[:, 42].abs() + 0.5
        statistics = [
            shard_statistics(rows[:, a:b].contiguous(), shard_targets(targets, a, b - a), inverse)
            for a, b in ((0, 30), (30, 41))
        ]
        logprobs, entropy, stats = fold_statistics(torch.stack(statistics))
        return torch.cat([logprobs, entropy[:, None], stats], 1)

    with use_backend("triton"):
        assert_row_invariant(op, randn(3, 43).to(DEVICE), PADDING)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_of_shards_are_those_of_the_whole_row_in_double(dtype):
    rows = 4
    logits, targets, inverse = (
        randn(rows, VOCAB, scale=2).to(DEVICE),
        ids((rows,), VOCAB).to(DEVICE),
        warmth(rows).to(DEVICE),
    )
    logits[::2, 5] = -INF
    targets[::2] = 9
    g, h = randn(rows).to(DEVICE), randn(rows, seed=1).to(DEVICE)
    wide = logits.clamp_min(-1e4).double().requires_grad_()  # autograd makes NaN of -inf
    exact, exact_entropy = exact_logprobs(wide, targets[:, None], inverse)
    (exact[:, 0] @ g.double() + exact_entropy @ h.double()).backward()
    with use_backend("triton"):
        _, entropy, stats = fold_statistics(statistics_of(logits, targets[:, None], inverse, 3))
        parts = [
            shard_logprob_backward(
                logits[:, a:b].clone(), shard_targets(targets, a, b - a), inverse, stats, entropy, g, h, dtype
            )
            for a, b in shards_of(3)
        ]
    assert_near(torch.cat(parts, 1), grad_of(wide), dtype, ulps=2 if dtype == torch.float16 else 32)
