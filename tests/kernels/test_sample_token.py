import math

import pytest
import torch

from engine.errors import InputError
from engine.kernels.op import extension, use_backend, use_isa
from engine.kernels.sample_token import hash_seed, sample_token, top_logprobs
from tests.kernels.cases import FILTERS, ISAS, needs_cpu, randn, record, sampling, threads
from tests.row_invariance import assert_row_invariant, assert_same_bits

pytestmark = needs_cpu


def draw(logits, **settings):
    return sample_token(logits, *sampling(len(logits), **settings))


def chi_square(tokens, probabilities):
    """Statistic over its mean, less 1, in standard deviations; cells of under 5 expected draws are pooled."""
    observed = torch.bincount(tokens.long(), minlength=len(probabilities)).double()
    expected = probabilities.double() * len(tokens)
    small = expected < 5
    observed = torch.cat([observed[~small], observed[small].sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    keep = expected > 0
    assert observed[~keep].sum() == 0, "a token of probability 0 was drawn"
    freedom = int(keep.sum()) - 1
    return float((((observed - expected) ** 2 / expected)[keep].sum() - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("vocab", [96, 1000])
@pytest.mark.parametrize("isa", ISAS)
def test_draws_follow_the_softmax(isa, vocab):
    logits = randn(1, vocab, scale=1.5)
    with use_isa(isa):
        tokens, logprobs, kept_mass = draw(logits.repeat(20000, 1), temperature=0.8)
    p = torch.softmax(logits[0].double() / 0.8, -1)
    assert abs(chi_square(tokens, p)) < 5  # the seed is fixed: this is one number, 5 deviations from what it should be
    torch.testing.assert_close(logprobs.double(), p.log()[tokens.long()], rtol=1e-5, atol=1e-5)
    assert (kept_mass == 1).all()


def test_draws_with_filters_follow_the_cut_distribution():
    logits = randn(1, 300, scale=2)
    tokens, _, kept_mass = draw(logits.repeat(20000, 1), top_k=40, top_p=0.9, min_p=0.01)
    p = torch.softmax(logits[0].double(), -1)
    p = torch.where(p >= 0.01 * p.max(), p, 0)
    p = torch.where(p >= p.topk(40).values[-1], p, 0)
    order = p.argsort(descending=True)
    length = int((p[order].cumsum(0) < 0.9 * p.sum()).sum()) + 1
    p[order[length:]] = 0
    assert abs(chi_square(tokens, p / p.sum())) < 5
    assert abs(kept_mass[0] - p.sum()) < 1e-6


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_every_filter_matches_the_definition(isa, filters, ties):
    logits = randn(40, 700, scale=3)
    if ties:
        logits = logits.round()
    with use_isa(isa):
        tokens, logprobs, kept_mass = draw(logits, **filters)
    with use_backend("torch"):
        expected = draw(logits, **filters)
    assert tokens.tolist() == expected[0].tolist()
    torch.testing.assert_close(logprobs, expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kept_mass, expected[2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("isa", ISAS)
def test_row_invariant(isa):
    """Every row with its own parameters: none of the outputs may depend on the neighbours."""

    def op(rows):
        knobs = rows[:, 600:].abs()
        counter = (knobs[:, 0] * 1e6).long()
        outputs = sample_token(
            rows[:, :600].contiguous(),
            knobs[:, 1].contiguous(),
            (knobs[:, 2] * 20).int(),
            (knobs[:, 3] % 1).clamp_min(0.01),
            (knobs[:, 4] - 0.7).clamp(0, 0.5),
            counter * 3,
            counter,
        )
        return torch.stack([output.double() for output in outputs], 1)

    with use_isa(isa):
        assert_row_invariant(op, randn(37, 605, scale=1.5))


@pytest.mark.parametrize("isa", ISAS)
def test_temperature_0_takes_the_smallest_of_the_likeliest_ids(isa):
    logits = randn(5, 700)
    logits[:, [699, 300, 301]] = 9.0
    with use_isa(isa):
        tokens, logprobs, _ = draw(logits, temperature=0.0)
    assert tokens.tolist() == [300] * 5
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, -1)[:, 300], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"temperature": 0.0}], ids=str)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("isa", ISAS)
def test_a_row_that_is_not_finite_gives_no_token(isa, poison, filters):
    logits = randn(3, 700)
    logits[1, 650] = poison
    with use_isa(isa):
        tokens, logprobs, kept_mass = draw(logits, **filters)
    assert tokens[1] == -1
    assert logprobs[1].isnan()
    assert kept_mass[1].isnan()
    assert (tokens[[0, 2]] >= 0).all()
    with use_backend("torch"):
        assert draw(logits, **filters)[0].tolist() == tokens.tolist()


@pytest.mark.parametrize("isa", ISAS)
def test_a_mass_that_is_reached_exactly_keeps_no_token_more(isa):
    """Of four ids as likely as each other the first two have half of the mass."""
    with use_isa(isa):
        tokens, _, kept_mass = draw(torch.zeros(200, 4), top_p=0.5)
    assert set(tokens.tolist()) == {0, 1}
    assert (kept_mass == 0.5).all()


def test_tokens_of_probability_0_are_never_drawn():
    logits = torch.full((4000, 600), -math.inf)
    logits[:, [5, 400]] = 1.0
    tokens, logprobs, _ = draw(logits)
    assert set(tokens.tolist()) == {5, 400}
    assert abs(logprobs[0] + math.log(2)) < 1e-6


def test_seed_and_counter_alone_choose_the_number():
    logits = torch.zeros(200, 5000)
    counter = torch.arange(200)
    first, again = draw(logits, counter=counter)[0], draw(logits, counter=counter)[0]
    assert_same_bits(first, again, "same seed")
    other_seed, other_counter = draw(logits, seed=12)[0], draw(logits, counter=counter + 1000)[0]
    assert (first != other_seed).float().mean() > 0.95
    assert (first != other_counter).float().mean() > 0.95
    assert_same_bits(first[1:], draw(logits, counter=counter + 1)[0][:-1], "the counter shifted by one")


def test_hash_seed_is_the_same_in_python_and_cpp():
    for values in [(0, 0), (7, 1), (-1, 2**62), (2**63 - 1, -(2**63))]:
        assert hash_seed(*values) == extension().hash_seed(*values)
        assert -(2**63) <= hash_seed(*values) < 2**63
    assert hash_seed(1, 2) != hash_seed(2, 1)
    assert hash_seed(1, 2, 3) == hash_seed(1, 2, 3)


def test_bits_do_not_depend_on_threads():
    logits = randn(64, 5000, scale=2)
    results = []
    for count in (1, 2):
        with threads(count):
            results.append((*draw(logits), *draw(logits, top_p=0.8)))
    for one, two in zip(*results, strict=True):
        assert_same_bits(one, two, "1 and 2 threads")


def test_replay_equals_eager_for_fewer_rows():
    logits = randn(12, 300)
    parameters = sampling(12)
    graph, outputs = record(lambda: sample_token(logits, *parameters))
    logits.copy_(randn(12, 300, seed=1))
    graph.replay(5)
    for recorded, eager in zip(outputs, sample_token(logits, *parameters), strict=True):
        assert_same_bits(recorded[:5], eager[:5], "replay")


def test_top_logprobs_are_sorted_and_right():
    logits = randn(4, 300, scale=3)
    found, logprobs = top_logprobs(logits, 6)
    expected = torch.log_softmax(logits, -1).topk(6)
    assert found.tolist() == expected.indices.tolist()
    torch.testing.assert_close(logprobs, expected.values, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="k is 301"):
        top_logprobs(logits, 301)


def test_parameters_of_another_length_are_refused():
    with pytest.raises(InputError, match=r"counter has shape \[4\]; it must be \[3\]"):
        draw(torch.zeros(3, 8), counter=torch.arange(4))
