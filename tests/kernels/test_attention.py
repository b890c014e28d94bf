"""Attention: values and gradients against a definition in fp64, and the same bits in every mode, on every code path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from engine.errors import InputError
from engine.kernels.attention import AttentionPlan, AttentionSpec, allocate_pages, attention
from engine.kernels.graph import Graph
from engine.kernels.op import cpu_missing, extension, isas, use_backend, use_isa
from engine.kernels.rope import apply_rope, rope_table
from engine.kernels.weight import Weight
from tests.row_invariance import assert_same_bits

if cpu_missing():
    pytest.skip(cpu_missing(), allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16]
LENGTHS = [1, 7, 17, 33, 65, 130, 257]
# (H, K, Dh, window): 1, 3 and 8 query heads a key head; head widths of whole and half matrix instructions.
SHAPES = [(2, 2, 16, None), (3, 1, 32, 40), (6, 2, 64, None), (3, 1, 80, 40), (8, 1, 96, None), (2, 1, 128, None)]


@pytest.fixture(params=isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_isa(request.param):
        yield request.param


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = extension().num_threads()
    yield extension().set_num_threads
    extension().set_num_threads(before)


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def plan_of(lengths: list[int], contexts: list[int] | None = None, tables: Tensor | None = None,
            page_size: int = 16) -> AttentionPlan:  # fmt: skip
    """A plan in which the rows of each sequence are the last of its context."""
    contexts = contexts or lengths
    positions = [c - n + i for n, c in zip(lengths, contexts, strict=True) for i in range(n)]
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    plan = AttentionPlan()
    if tables is None:
        plan.build(int32(starts), int32(contexts), int32(positions))
    else:
        plan.build(int32(starts), int32(contexts), int32(positions), tables, page_size)
    return plan


def norms_of(spec: AttentionSpec, dtype: torch.dtype) -> list[Weight]:
    generator = torch.Generator().manual_seed(3)
    norms = []
    for name in ("q_norm", "k_norm"):
        norm = Weight(name, (spec.head_dim,), dtype, packed=False)
        norm.load_(torch.rand(spec.head_dim, generator=generator) + 0.5)
        norms.append(norm)
    return norms


def definition(qkv: Tensor, spec: AttentionSpec, rope: Tensor, lengths: list[int], q_norm: Tensor | None,
               k_norm: Tensor | None) -> Tensor:  # fmt: skip
    """Whole sequences, one after another, in qkv's dtype."""
    outs = []
    for part in qkv.split(lengths):
        heads = part.view(len(part), -1, spec.head_dim)
        q, k, v = heads.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], 1)
        if q_norm is not None and k_norm is not None:
            q = torch.nn.functional.rms_norm(q, (spec.head_dim,), q_norm.to(qkv.dtype), spec.eps)
            k = torch.nn.functional.rms_norm(k, (spec.head_dim,), k_norm.to(qkv.dtype), spec.eps)
        at = torch.arange(len(part))
        q, k = apply_rope(q, rope.to(qkv.dtype), at), apply_rope(k, rope.to(qkv.dtype), at)
        visible = at[None] <= at[:, None]
        if spec.window:
            visible &= at[None] > at[:, None] - spec.window
        k, v = (x.repeat_interleave(spec.num_heads // spec.num_kv_heads, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * spec.scale
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
    return torch.cat(outs)


@cache
def example(spec: AttentionSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Inputs qkv and d_out, and (out, d_qkv, d_q_norm, d_k_norm) of the definition in fp64 and in `dtype`."""
    torch.manual_seed(0)
    qkv = torch.randn(sum(LENGTHS), spec.row_size).to(dtype)
    d_out = torch.randn(sum(LENGTHS), spec.num_heads * spec.head_dim).to(dtype)
    rope = rope_table(spec.head_dim, 10000.0, None, 300)
    results: list[list[Tensor]] = []
    for compute in (torch.float64, dtype):
        x = qkv.to(compute, copy=True).requires_grad_()
        weights = [n.data.to(compute, copy=True).requires_grad_() for n in norms_of(spec, dtype)]
        out = definition(x, spec, rope, LENGTHS, *weights)
        results.append([out.detach(), *torch.autograd.grad(out, [x, *weights], d_out.to(compute))])
    return qkv, d_out, results[0], results[1]


def assert_close(actual: Tensor, exact: Tensor, plain: Tensor, what: str) -> None:
    """fp32: chains of up to 2,000 sums, hence 1e-5 of the largest value. bf16, where what is rounded decides (P and dS
    are): at most twice the error of plain torch in bf16, the largest and the mean one."""
    ours, theirs = (actual.double() - exact).abs(), (plain.double() - exact).abs()
    if plain.dtype == torch.float32:
        assert ours.max() <= 1e-5 * exact.abs().max(), f"{what}: off by {ours.max():.2e}, torch by {theirs.max():.2e}"
    else:
        assert ours.max() <= 2 * theirs.max(), f"{what}: off by {ours.max():.2e}, torch by {theirs.max():.2e}"
        assert ours.mean() <= 2 * theirs.mean(), f"{what}: off by {ours.mean():.2e}, torch by {theirs.mean():.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients_agree_with_fp64(
    isa: str, shape: tuple[int, int, int, int | None], dtype: torch.dtype
) -> None:
    spec = AttentionSpec(*shape)
    qkv, d_out, exact, plain = example(spec, dtype)
    norms = norms_of(spec, dtype)
    x = qkv.clone().requires_grad_()
    out = attention(x, spec, rope_table(spec.head_dim, 10000.0, None, 300), plan_of(LENGTHS), None, None, *norms)
    out.backward(d_out)
    assert x.grad is not None and out.dtype == x.grad.dtype == dtype
    ours = [out.detach(), x.grad, *(n.grad_buffer() for n in norms)]
    names = ("out", "d_qkv", "d_q_norm", "d_k_norm")
    for name, a, b, c in zip(names, ours, exact, plain, strict=True):
        assert_close(a, b, c, name)


@pytest.mark.parametrize("shape", [(6, 2, 64), (4, 4, 16)])
def test_without_norms_forward_and_gradient_agree_with_fp64(isa: str, shape: tuple[int, int, int]) -> None:
    spec = AttentionSpec(*shape, scale=0.3)
    rope = rope_table(spec.head_dim, 500.0, None, 300)
    qkv = torch.randn(sum(LENGTHS), spec.row_size)
    x, y = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
    out, exact = attention(x, spec, rope, plan_of(LENGTHS)), definition(y, spec, rope, LENGTHS, None, None)
    d_out = torch.randn_like(out)
    out.backward(d_out)
    exact.backward(d_out.double())
    assert x.grad is not None and y.grad is not None
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-4)


def test_torch_backend_agrees_with_the_kernel_with_and_without_a_cache() -> None:
    spec = AttentionSpec(6, 2, 48, window=50)
    rope = rope_table(48, 10000.0, None, 300)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 4e-2)):
        qkv = torch.randn(sum(LENGTHS), spec.row_size).to(dtype)
        d_out = torch.randn(sum(LENGTHS), 6 * 48).to(dtype)
        results = {}
        for backend in ("cpu", "torch"):
            with use_backend(backend):
                norms = norms_of(spec, dtype)
                x = qkv.clone().requires_grad_()
                attention(x, spec, rope, plan_of(LENGTHS), None, None, *norms).backward(d_out)
                cached = Cache(spec, dtype, LENGTHS, 32).run(qkv, rope, [[n - n // 2, n // 2] for n in LENGTHS], norms)
                results[backend] = [cached, x.grad, *(n.grad for n in norms)]
        for a, b in zip(results["cpu"], results["torch"], strict=True):
            assert a is not None and b is not None
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


class Cache:
    """Sequences in shuffled pages, fed in pieces."""

    def __init__(self, spec: AttentionSpec, dtype: torch.dtype, lengths: list[int], page_size: int, fill: float = 0.0,
                 shared: int = 0) -> None:  # fmt: skip
        """The first `shared` keys of all sequences lie in the same pages."""
        self.spec, self.lengths, self.page_size = spec, lengths, page_size
        width = -(-max(lengths) // page_size)
        tables = torch.arange(len(lengths) * width, dtype=torch.int32).view(len(lengths), width)
        tables[:, : shared // page_size] = tables[0, : shared // page_size]
        self.tables = torch.randperm(tables.numel(), dtype=torch.int32)[tables.long()].contiguous()
        self.keys, self.values = allocate_pages(tables.numel(), page_size, spec, dtype)
        self.keys.fill_(fill)
        self.values.fill_(fill)

    def feed(self, rows: list[Tensor], contexts: list[int], which: list[int], rope: Tensor,
             norms: list[Weight]) -> list[Tensor]:  # fmt: skip
        counts = [len(r) for r in rows]
        plan = plan_of(counts, contexts, self.tables[which].contiguous(), self.page_size)
        out = attention(torch.cat(rows), self.spec, rope, plan, self.keys, self.values, *norms)
        return list(out.split(counts))

    def run(self, qkv: Tensor, rope: Tensor, pieces: list[list[int]], norms: list[Weight]) -> Tensor:
        """Feeds sequence s its rows pieces[s][0], pieces[s][1], ... at a time, all sequences in step."""
        parts, done = qkv.split(self.lengths), [0] * len(self.lengths)
        outs: list[list[Tensor]] = [[] for _ in self.lengths]
        for turn in range(max(map(len, pieces))):
            which = [s for s, p in enumerate(pieces) if turn < len(p)]
            rows = [parts[s][done[s] : done[s] + pieces[s][turn]] for s in which]
            for s, r in zip(which, rows, strict=True):
                done[s] += len(r)
            for s, out in zip(which, self.feed(rows, [done[s] for s in which], which, rope, norms), strict=True):
                outs[s].append(out)
        return torch.cat([torch.cat(o) for o in outs])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 2, 64, None), (4, 4, 16, 40), (8, 1, 48, 50)])
def test_every_mode_gives_the_same_bits(isa: str, shape: tuple[int, int, int, int | None], dtype: torch.dtype,
                                        threads: Callable[[int], None]) -> None:  # fmt: skip
    """Training == prefill == chunked prefill == token by token, for any page size and number of threads."""
    spec = AttentionSpec(*shape)
    rope = rope_table(spec.head_dim, 10000.0, None, 300)
    lengths = [5, 40, 135]
    qkv = torch.randn(sum(lengths), spec.row_size).to(dtype)
    norms = norms_of(spec, dtype)
    trained = attention(qkv.clone().requires_grad_(), spec, rope, plan_of(lengths), None, None, *norms).detach()
    assert_same_bits(attention(qkv, spec, rope, plan_of(lengths), None, None, *norms), trained, "scoring")
    whole = [[n] for n in lengths]
    chunked = [[19] * (n // 19) + [n % 19] * (n % 19 > 0) for n in lengths]
    decoded = [[n - m] + [1] * m for n, m in zip(lengths, (4, 9, 15), strict=True)]
    for page_size in (16, 32, 48, 128):
        for count in (1, 2) if page_size == 16 else (2,):
            threads(count)
            cache = Cache(spec, dtype, lengths, page_size, fill=float("nan"))
            assert_same_bits(cache.run(qkv, rope, whole, norms), trained, f"prefill, pages of {page_size}")
        cache = Cache(spec, dtype, lengths, page_size, fill=float("nan"))
        assert_same_bits(cache.run(qkv, rope, chunked, norms), trained, f"chunked prefill, pages of {page_size}")
        if page_size < 48:
            cache = Cache(spec, dtype, lengths, page_size, fill=float("nan"))
            assert_same_bits(cache.run(qkv, rope, decoded, norms), trained, f"decode, pages of {page_size}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [16, 64])
def test_a_group_that_shares_pages_decodes_with_the_bits_of_each_alone(isa: str, page_size: int,
                                                                       dtype: torch.dtype) -> None:  # fmt: skip
    spec = AttentionSpec(6, 2, 32)
    rope = rope_table(32, 10000.0, None, 700)
    shared, lengths = 320, [*range(321, 341), 322, 450, 500]
    prompt = torch.randn(shared, spec.row_size).to(dtype)
    parts = [torch.cat([prompt, torch.randn(n - shared, spec.row_size).to(dtype)]) for n in lengths]
    norms = norms_of(spec, dtype)
    alone = torch.cat([attention(p, spec, rope, plan_of([len(p)]), None, None, *norms)[-1:] for p in parts])
    cache = Cache(spec, dtype, lengths, page_size, shared=shared)
    for s, part in enumerate(parts):  # each alone, the last row left to decode
        cache.feed([part[:-1]], [len(part) - 1], [s], rope, norms)
    outs = cache.feed([p[-1:] for p in parts], lengths, list(range(len(parts))), rope, norms)
    assert_same_bits(torch.cat(outs), alone, f"a group in pages of {page_size}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_stale_pages_hold_does_not_leak(isa: str, dtype: torch.dtype) -> None:
    spec = AttentionSpec(3, 1, 64, window=20)
    rope = rope_table(64, 10000.0, None, 100)
    lengths = [1, 15, 16, 17, 33, 50]
    qkv = torch.randn(sum(lengths), spec.row_size).to(dtype)
    norms = norms_of(spec, dtype)
    pieces = [[n - n // 4] + [1] * (n // 4) for n in lengths]
    for page_size in (16, 32):
        clean = Cache(spec, dtype, lengths, page_size).run(qkv, rope, pieces, norms)
        for fill in (float("nan"), float("inf")):
            stale = Cache(spec, dtype, lengths, page_size, fill=fill).run(qkv, rope, pieces, norms)
            assert_same_bits(stale, clean, f"pages full of {fill}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_gives_the_same_bits_for_any_number_of_threads(
    isa: str, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    spec = AttentionSpec(6, 2, 64)
    rope = rope_table(64, 10000.0, None, 300)
    qkv = torch.randn(sum(LENGTHS), spec.row_size).to(dtype)
    d_out = torch.randn(sum(LENGTHS), 6 * 64).to(dtype)
    results = []
    for count in (1, 2, 2):
        threads(count)
        norms = norms_of(spec, dtype)
        x = qkv.clone().requires_grad_()
        attention(x, spec, rope, plan_of(LENGTHS), None, None, *norms).backward(d_out)
        results.append((x.grad, *(n.grad for n in norms)))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert a is not None and b is not None
            assert_same_bits(a, b, "gradient")


def test_gradients_of_the_norms_add_up() -> None:
    spec = AttentionSpec(2, 1, 32)
    rope = rope_table(32, 10000.0, None, 100)
    norms = norms_of(spec, torch.float32)
    qkv = torch.randn(20, spec.row_size)
    for times in (1, 2):
        x = qkv.clone().requires_grad_()
        attention(x, spec, rope, plan_of([20]), None, None, *norms).square().sum().backward()
        if times == 1:
            once = [n.grad_buffer().clone() for n in norms]
    for norm, first in zip(norms, once, strict=True):
        assert first.abs().max() > 0
        torch.testing.assert_close(norm.grad_buffer(), 2 * first)


def test_graph_replay_equals_eager_for_whatever_the_plan_holds() -> None:
    spec = AttentionSpec(6, 2, 32)
    rope = rope_table(32, 10000.0, None, 300)
    dtype = torch.bfloat16
    norms = norms_of(spec, dtype)
    qkv = torch.zeros(64, spec.row_size, dtype=dtype)
    eager, recorded = Cache(spec, dtype, [200, 100, 40], 16), Cache(spec, dtype, [200, 100, 40], 16)
    recorded.tables = eager.tables
    plan = plan_of([1], [1], recorded.tables[:1].contiguous())
    with Graph() as graph:
        out = attention(qkv, spec, rope, plan, recorded.keys, recorded.values, *norms)
    contexts = [0, 0, 0]
    for counts in ([30, 20, 10], [33, 1, 30], [1, 1, 0], [64, 0, 0], [1, 1, 0]):
        which = [s for s, n in enumerate(counts) if n]
        contexts = [c + n for c, n in zip(contexts, counts, strict=True)]
        rows = [torch.randn(counts[s], spec.row_size).to(dtype) for s in which]
        expected = torch.cat(eager.feed(rows, [contexts[s] for s in which], which, rope, norms))
        total = sum(counts)
        qkv[:total] = torch.cat(rows)
        starts = [sum(counts[s] for s in which[:i]) for i in range(len(which) + 1)]
        positions = [contexts[s] - counts[s] + i for s in which for i in range(counts[s])]
        plan.build(int32(starts), int32([contexts[s] for s in which]), int32(positions),
                   recorded.tables[which].contiguous(), 16)  # fmt: skip
        graph.replay(total)
        assert_same_bits(out[:total], expected, f"replay of {counts}")


def test_rotation_follows_positions_and_not_the_place_in_the_batch() -> None:
    """Scores depend on distances only, so shifted positions give nearly the same values, and other bits."""
    spec = AttentionSpec(2, 1, 32)
    rope = rope_table(32, 10000.0, None, 100)
    qkv = torch.randn(20, spec.row_size)
    outs = []
    for shift in (0, 50):
        plan = AttentionPlan()
        plan.build(int32([0, 20]), int32([20]), torch.arange(shift, shift + 20, dtype=torch.int32))
        outs.append(attention(qkv, spec, rope, plan))
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-4)
    assert not torch.equal(outs[0], outs[1])


def test_a_nan_stays_in_its_own_sequence_and_behind_itself() -> None:
    spec = AttentionSpec(2, 1, 32)
    rope = rope_table(32, 10000.0, None, 100)
    qkv = torch.randn(40, spec.row_size)
    clean = attention(qkv, spec, rope, plan_of([20, 20]))
    qkv[25, :64] = float("nan")  # a query of the second sequence
    out = attention(qkv, spec, rope, plan_of([20, 20]))
    assert out[25].isnan().all()
    keep = torch.arange(40) != 25
    assert_same_bits(out[keep], clean[keep], "rows beside the NaN")


def test_bad_input_is_refused_by_name() -> None:
    spec = AttentionSpec(4, 2, 32)
    rope = rope_table(32, 10000.0, None, 64)
    qkv = torch.randn(10, spec.row_size)
    keys, values = allocate_pages(4, 16, spec, torch.float32)
    tables = int32([0]).view(1, 1)

    with pytest.raises(InputError, match="head_dim is 24"):
        replace(spec, head_dim=24)
    with pytest.raises(InputError, match="num_heads is 3"):
        replace(spec, num_heads=3)
    with pytest.raises(InputError, match="window is 0"):
        replace(spec, window=0)
    with pytest.raises(InputError, match="page_size is 24"):
        allocate_pages(4, 24, spec, torch.float32)
    with pytest.raises(InputError, match=r"qkv is \(10, 100\)"):
        attention(qkv[:, :100], spec, rope, plan_of([10]))
    with pytest.raises(InputError, match="int32"):
        attention(qkv.int(), spec, rope, plan_of([10]))
    with pytest.raises(InputError, match="give both or neither"):
        attention(qkv, spec, rope, plan_of([10], tables=tables), keys)
    with pytest.raises(InputError, match="has block tables"):
        attention(qkv, spec, rope, plan_of([10], tables=tables))
    with pytest.raises(InputError, match="no gradient through a KV cache"):
        attention(qkv.clone().requires_grad_(), spec, rope, plan_of([10], tables=tables), keys, values)
    with pytest.raises(InputError, match="more than its 1 pages hold"):
        plan_of([17], tables=tables)
    with pytest.raises(InputError, match="page -1"):
        plan_of([10], tables=-tables - 1)
    with pytest.raises(InputError, match="earlier keys need block_tables"):
        plan_of([10], [12])
    with pytest.raises(InputError, match="int64"):
        AttentionPlan().build(int32([0, 1]), torch.tensor([1]), int32([0]))
    with pytest.raises(InputError, match=r"keys is torch\.float32"):
        attention(qkv, spec, rope, plan_of([10], tables=tables), keys[:, 1:], values)
    with pytest.raises(ValueError, match="names page 7 of 4"):
        attention(qkv, spec, rope, plan_of([10], tables=tables + 7), keys, values)
    with pytest.raises(ValueError, match="the plan 9"):
        attention(qkv, spec, rope, plan_of([9]))
    with pytest.raises(ValueError, match="a position is 69 and the RoPE table ends at 63"):
        attention(torch.randn(70, spec.row_size), spec, rope, plan_of([70]))


def test_a_plan_built_anew_before_the_backward_is_refused() -> None:
    spec = AttentionSpec(2, 1, 32)
    plan = plan_of([10])
    out = attention(torch.randn(10, spec.row_size, requires_grad=True), spec, rope_table(32, 1e4, None, 64), plan)
    plan.build(int32([0, 10]), int32([10]), torch.arange(10, dtype=torch.int32))
    with pytest.raises(InputError, match="built anew"):
        out.sum().backward()
