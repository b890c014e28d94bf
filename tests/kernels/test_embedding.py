import pytest
import torch

from engine.errors import InputError
from engine.kernels.embedding import embedding
from engine.kernels.op import use_backend, use_isa
from tests.kernels.cases import (
    DTYPES,
    ISAS,
    SHARDS,
    code_path,
    grad_of,
    ids,
    needs_cpu,
    randn,
    record,
    threads,
    weight_of,
)
from tests.row_invariance import assert_row_invariant, assert_same_bits

pytestmark = needs_cpu


@pytest.mark.parametrize("width", [41, 64])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_gathers_rows_of_a_dense_or_packed_weight(isa, dtype, packed, width):
    values = randn(97, width).to(dtype)
    tokens = torch.cat([ids(50, 97), torch.tensor([0, 96], dtype=torch.int32)])
    with use_isa(isa), torch.no_grad():
        assert_same_bits(embedding(tokens, weight_of(values, dtype, packed)), values[tokens.long()], "rows")


def test_row_invariant():
    weight = weight_of(randn(128, 41), torch.bfloat16, packed=True)
    with torch.no_grad():
        assert_row_invariant(lambda tokens: embedding(tokens, weight), ids(37, 97))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", [*ISAS, "torch"])
def test_gradient_sums_repeated_tokens(isa, dtype, packed):
    weight, tokens, dy = weight_of(randn(13, 41), dtype, packed), ids(60, 13), randn(60, 41).to(dtype)
    weight.grad_buffer().fill_(1.0)
    with code_path(isa):
        embedding(tokens, weight).backward(dy)
    expected = torch.ones(13, 41, dtype=torch.float64).index_add_(0, tokens.long(), dy.double())
    torch.testing.assert_close(grad_of(weight).double(), expected, rtol=1e-5, atol=1e-5)


def test_is_the_root_of_a_graph_only_where_grad_is_enabled():
    weight, tokens = weight_of(randn(13, 8), torch.float32), ids(4, 13)
    assert embedding(tokens, weight).requires_grad
    with torch.no_grad():
        assert not embedding(tokens, weight).requires_grad
    with torch.inference_mode():
        assert not embedding(tokens, weight).requires_grad


def test_bits_do_not_depend_on_threads():
    tokens, dy = ids(2000, 17), randn(2000, 100)
    gradients = []
    for count in (1, 2):
        weight = weight_of(randn(17, 100), torch.float32)
        with threads(count):
            embedding(tokens, weight).backward(dy)
        gradients.append(grad_of(weight))
    assert_same_bits(gradients[0], gradients[1], "1 and 2 threads")


def test_replay_reads_the_tokens_of_now():
    weight, tokens = weight_of(randn(97, 41), torch.float32, packed=True), ids(12, 97)
    with torch.no_grad():
        graph, out = record(lambda: embedding(tokens, weight))
        tokens.copy_(ids(12, 97, seed=1))
        graph.replay(5)
        assert_same_bits(out[:5], embedding(tokens[:5], weight), "replay")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", [*ISAS, "torch"])
def test_a_shard_gives_its_rows_and_zeros_for_the_others(isa, dtype, packed):
    values, tokens = randn(97, 41).to(dtype), torch.cat([ids(60, 97), torch.arange(97, dtype=torch.int32)])
    with code_path(isa), torch.no_grad():
        for first, rows in SHARDS:
            weight = weight_of(values[first : first + rows], dtype, packed)
            here = (tokens >= first) & (tokens < first + rows)
            expected = torch.where(here[:, None], values[tokens.long()], 0)
            assert_same_bits(embedding(tokens, weight, first_row=first), expected, f"shard from {first}")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", [*ISAS, "torch"])
def test_gradients_of_shards_are_the_rows_of_the_whole_gradient_bitwise(isa, dtype, packed):
    values, tokens, dy = randn(97, 41).to(dtype), ids(300, 97), randn(300, 41).to(dtype)
    whole = weight_of(values, dtype, packed)
    with code_path(isa):
        embedding(tokens, whole).backward(dy)
        for first, rows in SHARDS:
            weight = weight_of(values[first : first + rows], dtype, packed)
            embedding(tokens, weight, first_row=first).backward(dy)
            assert_same_bits(grad_of(weight), grad_of(whole)[first : first + rows], f"shard from {first}")


def test_a_shard_is_row_invariant():
    weight = weight_of(randn(40, 41), torch.bfloat16, packed=True)
    with torch.no_grad():
        assert_row_invariant(lambda tokens: embedding(tokens, weight, first_row=30), ids(37, 97))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_shard_without_any_of_the_tokens_gives_zeros_and_no_gradient(backend):
    weight = weight_of(randn(13, 8), torch.float32)
    with use_backend(backend):
        out = embedding(torch.tensor([0, 12, 40, 2**31 - 1], dtype=torch.int32), weight, first_row=20)
        out.backward(torch.ones_like(out))
    assert not out.any()
    assert not grad_of(weight).any()


def test_a_shard_that_begins_before_its_table_is_refused():
    with pytest.raises(InputError, match="first_row is -1"):
        embedding(ids(4, 13), weight_of(randn(13, 8), torch.float32), first_row=-1)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("bad", [-1, 13])
def test_an_id_outside_the_vocabulary_is_refused(backend, bad):
    weight = weight_of(randn(13, 8), torch.float32)
    with use_backend(backend), pytest.raises(InputError, match=f"token id {bad} at index 1 .* 13 ids"):
        embedding(torch.tensor([3, bad], dtype=torch.int32), weight)
