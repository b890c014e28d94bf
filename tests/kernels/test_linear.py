"""The linear layer: values and gradients against fp64, and the contract of row invariance on every code path."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from engine.errors import InputError
from engine.kernels.graph import Graph, empty
from engine.kernels.linear import deferred_weight_gradients, linear, linear_grad_input, linear_grad_weight_
from engine.kernels.op import cpu_missing, extension, isas, use_backend, use_isa
from engine.kernels.weight import Weight
from tests.row_invariance import assert_row_invariant, assert_same_bits

if cpu_missing():
    pytest.skip(cpu_missing(), allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16]
# (T, N, K): single elements, odd everything, whole tiles, one more than whole tiles, several row blocks.
SHAPES = [(1, 1, 1), (7, 9, 17), (41, 130, 41), (130, 41, 130), (9, 64, 96), (32, 32, 64), (33, 49, 65), (300, 70, 34)]


@pytest.fixture(params=isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_isa(request.param):
        yield request.param


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = extension().num_threads()
    yield extension().set_num_threads
    extension().set_num_threads(before)


def make(rows: int, width: int, dtype: torch.dtype, bias: bool = False, seed: int = 0) -> tuple[Weight, Weight | None]:
    generator = torch.Generator().manual_seed(seed)
    weight = Weight("w", (rows, width), dtype, packed=True)
    weight.load_(torch.randn(rows, width, generator=generator) / width**0.5)
    if not bias:
        return weight, None
    vector = Weight("b", (rows,), dtype, packed=False)
    vector.load_(torch.randn(rows, generator=generator))
    return weight, vector


def assert_close(actual: Tensor, expected: Tensor, magnitude: Tensor, dtype: torch.dtype, terms: int) -> None:
    """Within the error bound of a fp32 sum of `terms` products (Higham, section 3.1) and one rounding to `dtype`.

    `magnitude` is the same sum over absolute values.
    """
    epsilon = torch.finfo(torch.float32).eps * (terms + 2)
    rounding = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0
    error = (actual.double() - expected).abs()
    bad = (error > epsilon * magnitude + rounding * expected.abs()).nonzero()
    if len(bad):
        at = tuple(bad[0].tolist())
        raise AssertionError(f"{len(bad)} elements are off, the first at {at}: {actual[at]} against {expected[at]}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_forward_and_gradients_agree_with_fp64(
    isa: str, shape: tuple[int, int, int], dtype: torch.dtype, with_bias: bool
) -> None:
    tokens, columns, width = shape
    weight, bias = make(columns, width, dtype, with_bias)
    x = torch.randn(tokens, width).to(dtype).requires_grad_()
    dy = torch.randn(tokens, columns).to(dtype)
    y = linear(x, weight, bias)
    y.backward(dy)
    x_, w_, dy_ = x.detach().double(), weight.dense().double(), dy.double()
    b_ = bias.dense().double() if bias else torch.zeros(columns).double()
    assert y.dtype == dtype and x.grad is not None and x.grad.dtype == dtype and weight.grad is not None
    assert_close(y.detach(), x_ @ w_.T + b_, x_.abs() @ w_.abs().T + b_.abs(), dtype, width)
    assert_close(x.grad, dy_ @ w_, dy_.abs() @ w_.abs(), dtype, columns)
    assert_close(weight.grad, dy_.T @ x_, dy_.abs().T @ x_.abs(), torch.float32, tokens)
    if bias:
        assert bias.grad is not None
        assert_close(bias.grad, dy_.sum(0), dy_.abs().sum(0), torch.float32, tokens)


def test_long_sums_cut_into_blocks_agree_with_fp64(isa: str) -> None:
    """Widths at which the backward keeps partial sums between blocks."""
    tokens, columns, width = 5, 40_000, 130
    for dtype in DTYPES:
        weight, _ = make(columns, width, dtype)
        dy = torch.randn(tokens, columns).to(dtype)
        dx = linear_grad_input(dy, weight)
        dy_, w_ = dy.double(), weight.dense().double()
        assert_close(dx, dy_ @ w_, dy_.abs() @ w_.abs(), dtype, columns)

    tokens, columns, width = 5000, 33, 17
    weight, _ = make(columns, width, torch.float32)
    dy, x = torch.randn(tokens, columns), torch.randn(tokens, width)
    linear_grad_weight_(dy, x, weight)
    expected, magnitude = dy.double().T @ x.double(), dy.double().abs().T @ x.double().abs()
    assert_close(weight.grad_buffer(), expected, magnitude, torch.float32, tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 17), (96, 64), (33, 130)])
def test_linear_is_row_invariant(isa: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, bias = make(*shape, dtype, bias=True)
    for tokens in (1, 16, 70):
        rows = torch.randn(tokens, shape[1]).to(dtype)
        assert_row_invariant(lambda x: linear(x, weight, bias), rows)
        assert_row_invariant(lambda x: linear(x, weight, out_dtype=torch.float32), rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_rows_gives_the_same_bits(isa: str, dtype: torch.dtype) -> None:
    weight, _ = make(130, 97, dtype)
    rows = torch.randn(600, 97).to(dtype)
    whole = linear(rows, weight, out_dtype=torch.float32)
    for count in [*range(1, 71), 255, 256, 257, 513]:
        start = (600 - count) // 2
        part = linear(rows[start : start + count], weight, out_dtype=torch.float32)
        assert_same_bits(part, whole[start : start + count], f"{count} rows")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_large_batch_equal_the_same_rows_alone(
    isa: str, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    """So many rows that each thread packs its own and the output goes past the caches; so few that all share."""
    weight, bias = make(512, 64, dtype, bias=True)
    rows = torch.randn(1100, 64).to(dtype)
    alone = torch.cat([linear(part, weight, bias) for part in rows.split(90)])
    for count in (1, 2):
        threads(count)
        assert_same_bits(linear(rows, weight, bias), alone, f"1100 rows on {count} threads")


@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_input_is_row_invariant(isa: str, dtype: torch.dtype) -> None:
    weight, _ = make(77, 50, dtype)
    assert_row_invariant(lambda dy: linear_grad_input(dy, weight), torch.randn(37, 77).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same_bits(
    isa: str, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    weight, bias = make(333, 100, dtype, bias=True)
    assert bias is not None
    x, dy = torch.randn(290, 100).to(dtype), torch.randn(290, 333).to(dtype)
    results = []
    for count in (1, 2, 3):
        threads(count)
        weight.zero_grad()
        bias.zero_grad()
        leaf = x.clone().requires_grad_()
        y = linear(leaf, weight, bias)
        y.backward(dy)
        assert leaf.grad is not None
        results.append([y.detach(), leaf.grad, weight.grad_buffer().clone(), bias.grad_buffer().clone()])
    for count, result in ((2, results[1]), (3, results[2])):
        for actual, expected, what in zip(result, results[0], ("y", "dx", "dW", "db"), strict=True):
            assert_same_bits(actual, expected, f"{what} of {count} threads against one")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_gradient_twice_has_the_same_bits_and_accumulates(isa: str, dtype: torch.dtype) -> None:
    weight, _ = make(49, 70, dtype)
    x, dy = torch.randn(120, 70).to(dtype), torch.randn(120, 49).to(dtype)
    linear_grad_weight_(dy, x, weight)
    first = weight.grad_buffer().clone()
    weight.zero_grad()
    linear_grad_weight_(dy, x, weight)
    assert_same_bits(weight.grad_buffer(), first, "second run")
    linear_grad_weight_(dy, x, weight)
    assert_close(weight.grad_buffer(), 2 * first.double(), dy.double().abs().T @ x.double().abs(), torch.float32, 240)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_equal_contiguous_rows(isa: str, dtype: torch.dtype) -> None:
    weight, _ = make(40, 64, dtype)
    wide = torch.randn(37, 200).to(dtype)
    for view in (wide[:, 3:67], wide[:, 64:128], wide[::2, 5:69], wide.T[:64].T, wide[:1, 8:72]):
        assert_same_bits(linear(view, weight), linear(view.contiguous(), weight), "strided x")
    dy = torch.randn(37, 100).to(dtype)[:, 11:51]
    assert_same_bits(linear_grad_input(dy, weight), linear_grad_input(dy.contiguous(), weight), "strided dy")
    expanded = torch.ones((), dtype=dtype).expand(37, 40)
    assert_same_bits(linear_grad_input(expanded, weight), linear_grad_input(expanded.contiguous(), weight), "expanded")


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_weights_stay_in_their_own_columns(isa: str, dtype: torch.dtype) -> None:
    """Padding and neighbouring panels must not leak: 0 x inf is NaN."""
    weight, _ = make(40, 41, dtype)
    dense = weight.dense()
    dense[17] = torch.inf
    weight.load_(dense)
    y = linear(torch.ones(5, 41).to(dtype), weight)
    assert y[:, 17].isinf().all()
    assert y.isfinite().sum() == 5 * 39


def test_logits_in_fp32_are_not_rounded(isa: str) -> None:
    weight, _ = make(40, 64, torch.bfloat16)
    x = torch.randn(5, 64).bfloat16()
    logits = linear(x, weight, out_dtype=torch.float32)
    assert logits.dtype == torch.float32
    assert (logits != logits.bfloat16().float()).any()
    assert_same_bits(linear(x, weight), logits.bfloat16(), "rounded once")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_recorded_linear_replays_on_fewer_rows(isa: str, dtype: torch.dtype) -> None:
    weight, bias = make(50, 30, dtype, bias=True)
    x = empty((20, 30), dtype)
    graph = Graph()
    with graph:
        y = linear(x, weight, bias)
    assert len(graph) == 1
    for rows in (20, 7, 1):
        fresh = torch.randn(rows, 30).to(dtype)
        x[:rows].copy_(fresh)
        graph.replay(rows)
        assert_same_bits(y[:rows], linear(fresh, weight, bias), f"replayed on {rows} rows")


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows_give_no_rows(isa: str, dtype: torch.dtype) -> None:
    weight, bias = make(50, 30, dtype, bias=True)
    x = torch.empty(0, 30, dtype=dtype, requires_grad=True)
    y = linear(x, weight, bias)
    y.sum().backward()
    assert y.shape == (0, 50) and x.grad is not None and x.grad.shape == (0, 30)
    assert not weight.grad_buffer().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_cpp_agrees_with_the_torch_definition(isa: str, dtype: torch.dtype) -> None:
    weight, bias = make(41, 60, dtype, bias=True)
    x, dy = torch.randn(23, 60).to(dtype), torch.randn(23, 41).to(dtype)
    results = []
    for backend in ("cpu", "torch"):
        leaf = x.clone().requires_grad_()
        weight.grad = None
        with use_backend(backend):
            y = linear(leaf, weight, bias)
            y.backward(dy)
        assert leaf.grad is not None
        results.append((y.detach(), leaf.grad, weight.grad_buffer()))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for ours, definition in zip(*results, strict=True):
        torch.testing.assert_close(ours, definition, rtol=tolerance, atol=tolerance)


def test_mismatches_are_refused_with_the_names_and_sizes() -> None:
    weight, bias = make(8, 4, torch.float32, bias=True)
    with pytest.raises(InputError, match=r"\(3, 5\).*needs \[T, 4\]"):
        linear(torch.zeros(3, 5), weight)
    with pytest.raises(InputError, match=r"bfloat16"):
        linear(torch.zeros(3, 4, dtype=torch.bfloat16), weight)
    with pytest.raises(InputError, match=r"bias b is \(8,\)"):
        linear(torch.zeros(3, 4), make(9, 4, torch.float32)[0], bias)
    with pytest.raises(InputError, match=r"float16"):
        linear(torch.zeros(3, 4), weight, out_dtype=torch.float16)
    with pytest.raises(InputError, match=r"3 rows and x has 2"):
        linear_grad_weight_(torch.zeros(3, 8), torch.zeros(2, 4), weight)
    with pytest.raises(InputError, match=r"stored dense"):
        linear(torch.zeros(3, 4), Weight("w", (8, 4), torch.float32, packed=False))


@pytest.mark.parametrize("dtype", DTYPES)
def test_deferred_weight_gradients_have_the_same_bits(dtype: torch.dtype) -> None:
    """Two calls of one weight, deferred, with another weight's in between."""
    gradients = []
    for deferred in (False, True):
        (first, bias), (second, _) = make(49, 65, dtype, bias=True), make(65, 49, dtype, seed=1)
        x = torch.randn(33, 65, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
        y = linear(linear(linear(x, first, bias), second), first, bias)
        if deferred:
            with deferred_weight_gradients() as queue:
                y.backward(torch.ones_like(y))
            assert first.grad is None and second.grad is None
            assert len(queue) == 3
            assert bias is not None and bias.grad is not None  # a vector's gradient costs nothing: it is there at once
            queue.run()
            assert len(queue) == 0
        else:
            y.backward(torch.ones_like(y))
        gradients.append([first.grad_buffer(), second.grad_buffer(), x.grad])
    for at_once, later in zip(*gradients, strict=True):
        assert_same_bits(later, at_once, "gradient")


def test_weight_gradients_are_deferred_inside_the_block_only() -> None:
    weight, _ = make(8, 8, torch.float32)
    x = torch.ones(3, 8)
    with pytest.raises(RuntimeError, match="on purpose"), deferred_weight_gradients() as outer:
        with deferred_weight_gradients() as inner:
            linear_grad_weight_(x, x, weight)
        linear_grad_weight_(x, x, weight)
        assert (len(outer), len(inner)) == (1, 1)
        raise RuntimeError("on purpose")
    linear_grad_weight_(x, x, weight)
    assert torch.equal(weight.grad_buffer(), torch.full((8, 8), 3.0))
