import pytest
import torch

from engine.kernels.embedding import embedding
from engine.kernels.op import use_backend
from tests.kernels.cases import SHARDS, assert_near, grad_of, ids, randn
from tests.kernels.triton.cases import DEVICE, DTYPES, device_weight, needs_triton
from tests.row_invariance import assert_row_invariant, assert_same_bits

pytestmark = needs_triton


def here_in(tokens, first, rows):
    return (tokens >= first) & (tokens < first + rows)


@pytest.mark.parametrize("width", [1, 41, 1030])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gathers_rows(dtype, width):
    values = randn(97, width).to(DEVICE, dtype)
    tokens = torch.cat([ids(7, 97), ids(7, 97) * 0 + 96]).to(DEVICE)
    with use_backend("triton"), torch.no_grad():
        assert_same_bits(embedding(tokens, device_weight(values, dtype)), values[tokens.long()], "rows")


@pytest.mark.parametrize("first_row", [None, 30])
def test_rows_are_invariant(first_row):
    weight = device_weight(randn(40, 41), torch.float32)
    with use_backend("triton"), torch.no_grad():
        assert_row_invariant(lambda tokens: embedding(tokens, weight, first_row), ids(9, 40).to(DEVICE))


@pytest.mark.parametrize("bad", [-1, 13, 2**31 - 1])
def test_an_id_outside_the_table_is_a_row_of_nan_without_gradient(bad):
    weight, tokens = device_weight(randn(13, 8), torch.float32), torch.tensor([3, bad], dtype=torch.int32)
    with use_backend("triton"):
        out = embedding(tokens.to(DEVICE), weight)
        out.backward(torch.ones_like(out))
    assert out.isnan().all(1).tolist() == [False, True]
    assert grad_of(weight).sum(1).tolist() == [8.0 * (row == 3) for row in range(13)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_sums_repeated_tokens(dtype):
    """Runs of 1 token, of whole and partly filled blocks of 8, in columns of one and two programs."""
    tokens, dy = ids(40, 5).to(DEVICE), randn(40, 600).to(DEVICE, dtype)
    tokens[::3] = 7
    weight = device_weight(randn(13, 600), dtype, grad=1.0)
    with use_backend("triton"):
        embedding(tokens, weight).backward(dy)
    expected = torch.ones(13, 600, dtype=torch.float64, device=DEVICE).index_add_(0, tokens.long(), dy.double())
    assert_near(grad_of(weight), expected, torch.float32, ulps=8)


def test_a_gradient_is_the_same_bits_every_time():
    tokens, dy, gradients = ids(40, 5).to(DEVICE), randn(40, 41).to(DEVICE), []
    for _ in range(2):
        weight = device_weight(randn(13, 41), torch.float32)
        with use_backend("triton"):
            embedding(tokens, weight).backward(dy)
        gradients.append(grad_of(weight))
    assert_same_bits(gradients[0], gradients[1], "two runs")


def test_shards_give_their_rows_and_zeros_and_their_part_of_the_gradient_bitwise():
    values, tokens, dy = randn(97, 41).to(DEVICE), ids(60, 97).to(DEVICE), randn(60, 41).to(DEVICE)
    whole = device_weight(values, torch.float32)
    with use_backend("triton"):
        embedding(tokens, whole).backward(dy)
        for first, rows in SHARDS:
            shard = device_weight(values[first : first + rows], torch.float32)
            out = embedding(tokens, shard, first_row=first)
            out.backward(dy)
            expected = torch.where(here_in(tokens, first, rows)[:, None], values[tokens.long()], 0)
            assert_same_bits(out.detach(), expected, f"shard from {first}")
            assert_same_bits(grad_of(shard), grad_of(whole)[first : first + rows], f"gradient from {first}")


def test_no_tokens_leave_the_gradient_alone():
    weight = device_weight(randn(13, 8), torch.float32, grad=3.0)
    with use_backend("triton"):
        out = embedding(ids(0, 13).to(DEVICE), weight)
        out.sum().backward()
    assert out.shape == (0, 8)
    assert (grad_of(weight) == 3).all()
