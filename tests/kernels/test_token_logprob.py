import math

import pytest
import torch

from engine.errors import InputError
from engine.kernels.op import use_isa
from engine.kernels.sample_token import sample_token, top_logprobs
from engine.kernels.token_logprob import inverse_temperature, logits_logprob, token_logprob
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


@pytest.mark.parametrize("vocab", [1, 7, 96, 256, 257, 1000, 5003])
@pytest.mark.parametrize("isa", ISAS)
def test_matches_float64_log_softmax(isa, vocab):
    logits, targets, inverse = randn(9, vocab, scale=4), ids(9, vocab), warmth(9)
    with use_isa(isa):
        logprobs, entropy = logits_logprob(logits, targets, inverse)
    expected, expected_entropy = exact_logprobs(logits, targets[:, None], inverse)
    torch.testing.assert_close(logprobs.double(), expected[:, 0], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_minus_infinity_is_probability_zero(isa):
    logits = randn(3, 700)
    logits[:, 256:512] = -math.inf  # one whole chunk of the kernel, and single ids
    logits[:, 3] = -math.inf
    logits[2] = -math.inf
    logits[2, 600] = 5.0  # all the mass on one id
    with use_isa(isa):
        logprobs, entropy = logits_logprob(logits, torch.tensor([3, 0, 600], dtype=torch.int32))
    expected = torch.log_softmax(logits.double(), -1)
    assert logprobs[0] == -math.inf
    assert abs(logprobs[1] - expected[1, 0]) < 1e-6
    assert logprobs[2] == 0.0
    assert entropy[2] == 0.0
    assert (
        abs(entropy[0] + expected[0, expected[0] > -math.inf].exp().mul(expected[0, expected[0] > -math.inf]).sum())
        < 1e-5
    )


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("isa", ISAS)
def test_a_row_that_is_not_finite_says_so(isa, poison):
    logits = randn(4, 700)
    logits[0, 699], logits[1, 0] = poison, poison
    logits[2] = -math.inf
    with use_isa(isa):
        logprobs, entropy = logits_logprob(logits, torch.tensor([0, 5, 5, 5], dtype=torch.int32))
    assert logprobs.isnan().tolist() == [True, True, True, False]
    assert entropy.isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize("isa", ISAS)
def test_row_invariant(isa):
    head = weight_of(randn(601, 40, scale=0.3), torch.float32, packed=True)

    def op(rows):
        targets = rows[:, 40].abs().mul(5).int()
        return torch.stack(token_logprob(rows[:, :40].contiguous(), head, targets, rows[:, 41].abs() + 0.5), 1)

    with use_isa(isa):
        assert_row_invariant(op, randn(37, 42))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_chunk_changes_no_bit(dtype):
    hidden, head, targets = randn(50, 40).to(dtype), weight_of(randn(601, 40), dtype, packed=True), ids(50, 601)
    whole = token_logprob(hidden, head, targets)
    for chunk in (1, 7, 32):
        parts = token_logprob(hidden, head, targets, chunk=chunk)
        assert_same_bits(parts[0], whole[0], f"log-probabilities, chunk {chunk}")
        assert_same_bits(parts[1], whole[1], f"entropy, chunk {chunk}")


@pytest.mark.parametrize("vocab", [96, 1000, 5003])
@pytest.mark.parametrize("isa", ISAS)
def test_sampled_logprob_equals_scored_logprob_bitwise(isa, vocab):
    rows = 64
    logits, temperature = randn(rows, vocab, scale=3), warmth(rows, seed=3)
    temperature[::7] = 0.0
    top_k = torch.arange(rows, dtype=torch.int32) % 3 * 10
    off, counter = torch.zeros(rows), torch.arange(rows)
    with use_isa(isa):
        tokens, sampled, _ = sample_token(logits, temperature, top_k, off + 1, off, counter * 0 + 5, counter)
        inverse = torch.tensor([inverse_temperature(t) for t in temperature.tolist()])
        scored, _ = logits_logprob(logits, tokens, inverse)
        top_ids, top = top_logprobs(logits, 5, inverse)
    assert_same_bits(sampled, scored, "log-probabilities")
    greedy = temperature == 0
    assert_same_bits(top_ids[greedy, 0], tokens[greedy], "likeliest id")
    assert_same_bits(top[greedy, 0], sampled[greedy], "likeliest log-probability")


def test_inverse_temperature_divides_in_float32_as_the_sampler_does():
    """Division in float64 gives another float32 for some temperatures."""
    different = 0
    logits, targets = randn(1, 300, scale=3), torch.zeros(1, dtype=torch.int32)
    zero, one = torch.zeros(1), torch.ones(1)
    for hundredths in range(5, 200):
        heat = hundredths / 100
        integers = (zero.int(), one, zero, zero.long(), zero.long())
        targets, sampled, _ = sample_token(logits, torch.tensor([heat]), *integers)
        scored, _ = logits_logprob(logits, targets, torch.tensor([inverse_temperature(heat)]))
        assert_same_bits(sampled, scored, f"temperature {heat}")
        different += inverse_temperature(heat) != float(torch.tensor(1.0 / heat))
    assert different > 0
    assert inverse_temperature(0.0) == 1.0


@pytest.mark.parametrize("use_entropy", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", [*ISAS, "torch"])
def test_gradients_match_float64_autograd(isa, dtype, use_entropy):
    rows, vocab, width = 41, 301, 24
    hidden, head = randn(rows, width).to(dtype), weight_of(randn(vocab, width, scale=0.5), dtype, packed=True)
    targets, inverse, g, h = ids(rows, vocab), warmth(rows), randn(rows), randn(rows, seed=1) * use_entropy
    leaf = hidden.clone().requires_grad_()
    with code_path(isa):
        logprobs, entropy = token_logprob(leaf, head, targets, inverse, chunk=16)
        ((logprobs * g).sum() + ((entropy * h).sum() if use_entropy else 0.0)).backward()
    wide, wide_head = hidden.double().requires_grad_(), head.dense(dtype=torch.float64).requires_grad_()
    exact, exact_entropy = exact_logprobs(wide @ wide_head.T, targets[:, None], inverse)
    (exact[:, 0] @ g.double() + exact_entropy @ h.double()).backward()
    limit = 4 if dtype == torch.bfloat16 else 32  # float32 sums run over 301 logits
    assert_near(grad_of(leaf), grad_of(wide), dtype, ulps=limit)
    assert_near(grad_of(head), grad_of(wide_head), dtype, ulps=limit)


def test_gradient_of_a_token_that_cannot_be_drawn_is_finite():
    hidden, head = randn(2, 16, scale=200).requires_grad_(), weight_of(randn(99, 16), torch.float32, packed=True)
    logprobs, entropy = token_logprob(hidden, head, ids(2, 99))
    (logprobs.sum() + entropy.sum()).backward()
    assert grad_of(hidden).isfinite().all()
    assert grad_of(head).isfinite().all()


def test_bits_do_not_depend_on_threads():
    results = []
    for count in (1, 2):
        head, hidden = weight_of(randn(2000, 32), torch.bfloat16, packed=True), randn(60, 32).bfloat16()
        hidden.requires_grad_()
        with threads(count):
            logprobs, entropy = token_logprob(hidden, head, ids(60, 2000), chunk=25)
            (logprobs.sum() + entropy.sum()).backward()
        results.append((logprobs.detach(), entropy.detach(), grad_of(hidden), grad_of(head)))
    for one, two in zip(*results, strict=True):
        assert_same_bits(one, two, "1 and 2 threads")


@pytest.mark.parametrize("bad", [-1, 99])
def test_a_target_outside_the_vocabulary_is_refused(bad):
    head = weight_of(randn(99, 16), torch.float32, packed=True)
    with pytest.raises(InputError, match=f"target {bad} at index 1 .* 99 ids"):
        token_logprob(torch.zeros(2, 16), head, torch.tensor([0, bad], dtype=torch.int32))


def test_logits_that_require_grad_are_refused():
    with pytest.raises(InputError, match="use token_logprob"):
        logits_logprob(torch.zeros(1, 4, requires_grad=True), torch.zeros(1, dtype=torch.int32))
