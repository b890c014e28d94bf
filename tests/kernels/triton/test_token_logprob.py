import math

import pytest
import torch

from engine.kernels.op import use_backend
from engine.kernels.token_logprob import logits_logprob, token_logprob
from tests.kernels.cases import assert_near, exact_logprobs, grad_of, ids, randn, warmth
from tests.kernels.triton.cases import DEVICE, DTYPES, PADDING, device_weight, needs_triton
from tests.row_invariance import assert_row_invariant, assert_same_bits

# The interpreter computes with numpy, which warns of the NaN that some tests are about.
pytestmark = [needs_triton, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
INF = math.inf


@pytest.mark.parametrize("vocab", [1, 7, 4096, 4097, 9000])
def test_logprobs_and_entropy_are_those_of_the_definition_in_double(vocab):
    logits, targets, inverse = randn(3, vocab, scale=4).to(DEVICE), ids(3, vocab).to(DEVICE), warmth(3).to(DEVICE)
    with use_backend("triton"):
        logprobs, entropy = logits_logprob(logits, targets, inverse)
    expected, expected_entropy = exact_logprobs(logits, targets[:, None], inverse)
    torch.testing.assert_close(logprobs.double(), expected[:, 0], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=2e-6)


def test_a_tile_of_nothing_but_minus_infinity_has_no_mass():
    logits = randn(2, 9000).to(DEVICE)
    logits[0, :5000], logits[1, 4096:8192] = -INF, -INF
    with use_backend("triton"):
        logprobs, entropy = logits_logprob(logits, torch.tensor([10, 8200], dtype=torch.int32, device=DEVICE))
    expected = torch.log_softmax(logits.double(), -1)
    assert logprobs[0] == -INF
    torch.testing.assert_close(logprobs[1].double(), expected[1, 8200], rtol=1e-6, atol=1e-6)
    assert entropy.isfinite().all()


@pytest.mark.parametrize("poison", [math.nan, INF])
def test_a_row_that_is_not_finite_says_so(poison):
    logits = randn(4, 5000).to(DEVICE)
    logits[0, 4999], logits[1, 0], logits[2] = poison, poison, -INF
    with use_backend("triton"):
        logprobs, entropy = logits_logprob(logits, torch.tensor([0, 5, 5, 5], dtype=torch.int32, device=DEVICE))
    assert logprobs.isnan().tolist() == [True, True, True, False]
    assert entropy.isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize("use_entropy", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_the_definition_in_double(dtype, use_entropy):
    rows, vocab, width = 9, 301, 24
    hidden, head = randn(rows, width).to(DEVICE, dtype), device_weight(randn(vocab, width, scale=0.5), dtype)
    targets, inverse = ids(rows, vocab).to(DEVICE), warmth(rows).to(DEVICE)
    g, h = randn(rows).to(DEVICE), randn(rows, seed=1).to(DEVICE) * use_entropy
    leaf = hidden.clone().requires_grad_()
    with use_backend("triton"):
        logprobs, entropy = token_logprob(leaf, head, targets, inverse, chunk=8)
        ((logprobs * g).sum() + ((entropy * h).sum() if use_entropy else 0.0)).backward()
    wide, wide_head = hidden.double().requires_grad_(), head.dense(dtype=torch.float64).requires_grad_()
    exact, exact_entropy = exact_logprobs(wide @ wide_head.T, targets[:, None], inverse)
    (exact[:, 0] @ g.double() + exact_entropy @ h.double()).backward()
    assert_near(grad_of(leaf), grad_of(wide), dtype, ulps=32)
    assert_near(grad_of(head), grad_of(wide_head), dtype, ulps=32)


def test_gradient_of_a_token_that_cannot_be_drawn_is_finite():
    hidden, head = randn(2, 16, scale=200).to(DEVICE).requires_grad_(), device_weight(randn(99, 16), torch.float32)
    with use_backend("triton"):
        logprobs, entropy = token_logprob(hidden, head, ids(2, 99).to(DEVICE))
        (logprobs.sum() + entropy.sum()).backward()
    assert grad_of(hidden).isfinite().all()
    assert grad_of(head).isfinite().all()


def test_the_chunk_changes_no_bit():
    hidden, head, targets = (
        randn(9, 40).to(DEVICE),
        device_weight(randn(301, 40), torch.float32),
        ids(9, 301).to(DEVICE),
    )
    with use_backend("triton"):
        whole = token_logprob(hidden, head, targets)
        for chunk in (1, 4):
            for part, all_rows in zip(token_logprob(hidden, head, targets, chunk=chunk), whole, strict=True):
                assert_same_bits(part, all_rows, f"chunks of {chunk}")


def test_rows_are_invariant():
    def op(rows):
        targets, inverse = rows[:, 4200].abs().mul(5).int(), rows[:, 4201].abs() + 0.5
        return torch.stack(logits_logprob(rows[:, :4200].contiguous(), targets, inverse), 1)

    with use_backend("triton"):
        assert_row_invariant(op, randn(4, 4202).to(DEVICE), PADDING)


def test_no_rows_give_nothing_and_leave_the_head_alone():
    hidden, head = torch.empty(0, 16, device=DEVICE, requires_grad=True), device_weight(randn(99, 16), torch.float32)
    with use_backend("triton"):
        logprobs, entropy = token_logprob(hidden, head, ids(0, 99).to(DEVICE))
        (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.shape == entropy.shape == (0,)
    assert not grad_of(head).any()
