import math

import pytest
import torch

from engine.errors import InputError
from engine.kernels.op import use_backend
from engine.kernels.sample_token import sample_token, top_logprobs
from engine.kernels.token_logprob import logits_logprob
from tests.kernels.cases import FILTERS, randn, sampling
from tests.kernels.triton.cases import DEVICE, PADDING, needs_triton
from tests.row_invariance import assert_row_invariant, assert_same_bits

# The interpreter computes with numpy, which warns of the NaN that some tests are about.
pytestmark = [needs_triton, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def draw(logits, **settings):
    with use_backend("triton"):
        return sample_token(logits.to(DEVICE), *(each.to(DEVICE) for each in sampling(len(logits), **settings)))


def defined(logits, **settings):
    """What the definition in torch draws, on the CPU."""
    with use_backend("torch"):
        return sample_token(logits, *sampling(len(logits), **settings))


def assert_as_defined(logits, **settings):
    drawn = [each.cpu() for each in draw(logits, **settings)]
    tokens, logprobs, kept_mass = defined(logits, **settings)
    assert drawn[0].tolist() == tokens.tolist()
    torch.testing.assert_close(drawn[1], logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(drawn[2], kept_mass, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_every_filter_matches_the_definition(filters, ties):
    """In ties the rounded logits of hundreds of ids are the same, some of them 0 and -0."""
    logits = randn(2, 700, scale=3)
    assert_as_defined(logits.round() if ties else logits, **filters)


@pytest.mark.parametrize("filters", [{"top_k": 300, "top_p": 0.9}, {"min_p": 0.01}, {}], ids=str)
def test_a_row_of_several_tiles_matches_the_definition(filters):
    logits = randn(3, 9000, scale=2).round(decimals=1)
    logits[0, :5000] = -math.inf
    assert_as_defined(logits, **filters)


def test_draws_without_filters_match_the_definition():
    assert_as_defined(randn(100, 700, scale=2), temperature=0.8)


def test_temperature_0_takes_the_smallest_of_the_likeliest_ids():
    logits = randn(2, 5000)
    logits[0, [4999, 300, 301]], logits[1, [4999, 4100]] = 9.0, 9.0
    assert draw(logits, temperature=0.0)[0].tolist() == [300, 4100]


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"temperature": 0.0}], ids=str)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_row_that_is_not_finite_gives_no_token(poison, filters):
    logits = randn(3, 700)
    logits[1, 650] = poison
    tokens, logprobs, kept_mass = draw(logits, **filters)
    assert (tokens >= 0).tolist() == [True, False, True]
    assert tokens[1] == -1
    assert logprobs.isnan().tolist() == kept_mass.isnan().tolist() == [False, True, False]


def test_a_mass_that_is_reached_exactly_keeps_no_token_more():
    """Of four ids as likely as each other the first two have half of the mass."""
    tokens, _, kept_mass = draw(torch.zeros(20, 4), top_p=0.5)
    assert set(tokens.tolist()) == {0, 1}
    assert (kept_mass == 0.5).all()


@pytest.mark.parametrize("filters", [{}, {"top_k": 300}, {"top_p": 0.9999999}], ids=str)
def test_tokens_of_probability_0_are_never_drawn(filters):
    logits = torch.full((8, 600), -math.inf)
    logits[:, [5, 400]] = 1.0
    assert set(draw(logits, **filters)[0].tolist()) == {5, 400}


def test_sampled_logprob_is_the_scored_one_bitwise():
    temperatures = [0.05, 0.3, 0.7, 1.0, 1.1, 1.7]
    logits, parameters = randn(6, 5000, scale=3).to(DEVICE), [each.to(DEVICE) for each in sampling(6)]
    parameters[0] = torch.tensor(temperatures, device=DEVICE)
    inverse = (1.0 / torch.tensor(temperatures)).to(DEVICE)
    with use_backend("triton"):
        tokens, sampled, _ = sample_token(logits, *parameters)
        scored, _ = logits_logprob(logits, tokens, inverse)
        likeliest, top = top_logprobs(logits, 20, inverse)
        again, _ = logits_logprob(logits, likeliest[:, 17].contiguous(), inverse)
    assert_same_bits(sampled, scored, "sampled and scored")
    assert_same_bits(top[:, 17], again, "one of the likeliest")


def test_rows_are_invariant():
    """Every row with its own parameters: none of the outputs may depend on the neighbours."""

    def op(rows):
        knobs = rows[:, 90:].abs()
        counter = (knobs[:, 0] * 1e6).long()
        knobs = torch.where(knobs < 10, knobs, 0)  # padding takes the likeliest: it is not what is tested
        outputs = sample_token(
            rows[:, :90].contiguous(),
            knobs[:, 1].contiguous(),
            (knobs[:, 2] * 20).int() * (knobs[:, 2] > 1.2),
            torch.where(knobs[:, 3] > 0.8, (knobs[:, 3] % 1).clamp_min(0.01), 1.0),
            (knobs[:, 4] - 1.5).clamp(0, 0.5),
            counter * 3,
            counter,
        )
        return torch.stack([output.double() for output in outputs], 1)

    with use_backend("triton"):
        assert_row_invariant(op, randn(3, 95, scale=1.5).to(DEVICE), PADDING)


def test_no_rows_give_no_tokens():
    assert [each.shape for each in draw(torch.empty(0, 700))] == [(0,)] * 3


def test_a_vocabulary_whose_masses_cannot_be_summed_is_refused():
    with pytest.raises(InputError, match="524288 at most"):
        draw(torch.empty(1, 1 << 20))
