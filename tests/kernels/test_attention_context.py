"""Attention of some rows against the keys of all: the bits of the whole, and gradients that add up to the whole's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.errors import InputError
from engine.kernels.attention import AttentionPlan, AttentionSpec, allocate_pages, attention
from engine.kernels.graph import Graph
from engine.kernels.op import cpu_missing, extension, isas, use_backend, use_isa
from engine.kernels.rope import rope_table
from engine.kernels.weight import Weight
from tests.kernels.test_attention import definition, int32, norms_of, plan_of
from tests.row_invariance import assert_same_bits

if cpu_missing():
    pytest.skip(cpu_missing(), allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(2, 2, 16, None), (3, 1, 32, 40), (6, 2, 64, None), (8, 1, 48, 50)]  # H, K, Dh, window
Segment = tuple[int, int]


@pytest.fixture(params=isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_isa(request.param):
        yield request.param


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = extension().num_threads()
    yield extension().set_num_threads
    extension().set_num_threads(before)


def segments_plan(kv_plan: AttentionPlan, segments: list[Segment]) -> AttentionPlan:
    plan = AttentionPlan(kv_plan)
    plan.build_segments(int32([begin for begin, _ in segments]), int32([end for _, end in segments]))
    return plan


def deal(lengths: list[int], cuts: list[int], owners: list[int], num_ranks: int) -> list[list[Segment]]:
    """Cuts all rows at the ends of sequences and at `cuts`; piece i is that of rank owners[i] (which starts anew)."""
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    edges = sorted({*starts, *(cut for cut in cuts if 0 < cut < starts[-1])})
    ranks: list[list[Segment]] = [[] for _ in range(num_ranks)]
    for i, piece in enumerate(pairwise(edges)):
        ranks[owners[i % len(owners)] % num_ranks].append(piece)
    return ranks


def apart(qkv: Tensor, spec: AttentionSpec, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
    """The queries that `plan` chooses, and the keys and values of all rows."""
    queries = spec.num_heads * spec.head_dim
    return qkv[plan.rows(), :queries], qkv[:, queries:].contiguous()


splits = st.tuples(
    st.lists(st.integers(1, 150), min_size=1, max_size=4),  # lengths
    st.lists(st.integers(1, 400), max_size=8),  # cuts
    st.lists(st.integers(0, 3), min_size=1, max_size=6),  # owners
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(split=splits)
def test_rows_have_the_bits_that_they_have_among_all_rows(
    isa: str, shape: tuple[int, int, int, int | None], dtype: torch.dtype, split: tuple[list[int], list[int], list[int]]
) -> None:
    spec = AttentionSpec(*shape)
    rope = rope_table(spec.head_dim, 10000.0, None, 200)
    lengths, cuts, owners = split
    generator = torch.Generator().manual_seed(sum(lengths))
    qkv = torch.randn(sum(lengths), spec.row_size, generator=generator).to(dtype)
    kv_plan, norms = plan_of(lengths), norms_of(spec, dtype)
    whole = attention(qkv, spec, rope, kv_plan, None, None, *norms)
    for segments in deal(lengths, cuts, owners, 3):
        plan = segments_plan(kv_plan, segments)
        q, kv = apart(qkv, spec, plan)
        out = attention(q, spec, rope, plan, None, None, *norms, kv=kv)
        assert_same_bits(out, whole[plan.rows()], f"segments {segments}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [16, 48, 64])
def test_a_prefill_shared_by_ranks_has_the_bits_of_one(isa: str, page_size: int, dtype: torch.dtype) -> None:
    """Every rank writes all new keys to its pool, after those of an earlier step, and computes its own rows."""
    spec = AttentionSpec(6, 2, 32, window=70)
    rope = rope_table(32, 10000.0, None, 300)
    lengths, earlier = [130, 3, 40, 77], [60, 0, 33, 76]
    new = [n - e for n, e in zip(lengths, earlier, strict=True)]
    width = -(-max(lengths) // page_size)
    tables = torch.randperm(4 * width, dtype=torch.int32).view(4, width)
    steps = [torch.randn(sum(counts), spec.row_size).to(dtype) for counts in (earlier, new)]
    plans = [plan_of(earlier, earlier, tables, page_size), plan_of(new, lengths, tables, page_size)]
    norms = norms_of(spec, dtype)

    def pages_after_first_step() -> tuple[Tensor, Tensor]:
        keys, values = allocate_pages(tables.numel(), page_size, spec, dtype)
        attention(steps[0], spec, rope, plans[0], keys, values, *norms)
        return keys, values

    keys, values = pages_after_first_step()
    whole = attention(steps[1], spec, rope, plans[1], keys, values, *norms)
    for segments in deal(new, [20, 21, 50, 80], [0, 1, 1, 0], 2):
        plan = segments_plan(plans[1], segments)
        own_keys, own_values = pages_after_first_step()
        q, kv = apart(steps[1], spec, plan)
        out = attention(q, spec, rope, plan, own_keys, own_values, *norms, kv=kv)
        assert_same_bits(out, whole[plan.rows()], f"segments {segments}")
        assert_same_bits(own_keys, keys, "keys")
        assert_same_bits(own_values, values, "values")


def gradients(qkv: Tensor, spec: AttentionSpec, rope: Tensor, lengths: list[int], d_out: Tensor,
              ranks: list[list[Segment]] | None, norms: list[Weight]) -> list[Tensor]:  # fmt: skip
    """d_q, d_kv, d_q_norm, d_k_norm of all rows: sums over `ranks`, or of attention of all rows where that is None."""
    queries = spec.num_heads * spec.head_dim
    kv_plan = plan_of(lengths)
    if ranks is None:
        x = qkv.clone().requires_grad_()
        attention(x, spec, rope, kv_plan, None, None, *norms).backward(d_out)
        assert x.grad is not None
        d_q, d_kv = x.grad[:, :queries], x.grad[:, queries:].float()
    else:
        d_q, d_kv = torch.full((len(qkv), queries), float("nan"), dtype=qkv.dtype), torch.zeros(len(qkv), 1)
        for segments in ranks:
            plan = segments_plan(kv_plan, segments)
            own_q, kv = (x.requires_grad_() for x in apart(qkv, spec, plan))
            attention(own_q, spec, rope, plan, None, None, *norms, kv=kv).backward(d_out[plan.rows()])
            assert own_q.grad is not None and kv.grad is not None
            d_q[plan.rows()] = own_q.grad
            d_kv = d_kv + kv.grad
    return [d_q, d_kv, *(norm.grad_buffer() for norm in norms)]


LENGTHS, CUTS, OWNERS = [1, 70, 257, 33, 5], [20, 100, 150, 200, 260, 340], [0, 1, 2, 2, 1, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_ranks_add_up_to_those_of_one(isa: str, shape: tuple[int, int, int, int | None],
                                                   dtype: torch.dtype) -> None:  # fmt: skip
    spec = AttentionSpec(*shape)
    rope = rope_table(spec.head_dim, 10000.0, None, 300)
    qkv = torch.randn(sum(LENGTHS), spec.row_size).to(dtype)
    d_out = torch.randn(sum(LENGTHS), spec.num_heads * spec.head_dim).to(dtype)
    exact_norms = norms_of(spec, dtype)
    x = qkv.double().requires_grad_()
    q_norm, k_norm = (norm.data.double().requires_grad_() for norm in exact_norms)
    definition(x, spec, rope, LENGTHS, q_norm, k_norm).backward(d_out.double())
    assert x.grad is not None and q_norm.grad is not None and k_norm.grad is not None
    queries = spec.num_heads * spec.head_dim
    exact = [x.grad[:, :queries], x.grad[:, queries:], q_norm.grad, k_norm.grad]
    ranks = deal(LENGTHS, CUTS, OWNERS, 3)
    shared = gradients(qkv, spec, rope, LENGTHS, d_out, ranks, norms_of(spec, dtype))
    alone = gradients(qkv, spec, rope, LENGTHS, d_out, None, norms_of(spec, dtype))
    for name, ours, one, true in zip(("d_q", "d_kv", "d_q_norm", "d_k_norm"), shared, alone, exact, strict=True):
        error, size = (ours.double() - true).abs().max(), true.abs().max()
        # The sum over ranks rounds once a rank; in fp32 that cannot be seen.
        assert error <= 2.5 * (one.double() - true).abs().max() + 1e-6 * size, f"{name}: {error:.1e} of {size:.1e}"


def test_a_rank_that_holds_all_rows_has_the_gradients_of_one_to_the_bit() -> None:
    spec = AttentionSpec(6, 2, 64, window=90)
    rope = rope_table(64, 10000.0, None, 300)
    for dtype in DTYPES:
        qkv, d_out = torch.randn(sum(LENGTHS), spec.row_size).to(dtype), torch.randn(sum(LENGTHS), 6 * 64).to(dtype)
        starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS) + 1)]
        everything = [list(pairwise(starts))]
        shared = gradients(qkv, spec, rope, LENGTHS, d_out, everything, norms_of(spec, dtype))
        alone = gradients(qkv, spec, rope, LENGTHS, d_out, None, norms_of(spec, dtype))
        for ours, one in zip(shared, alone, strict=True):
            assert_same_bits(ours, one, "gradient")


def test_gradients_have_the_same_bits_for_any_number_of_threads(threads: Callable[[int], None]) -> None:
    spec = AttentionSpec(6, 2, 64)
    rope = rope_table(64, 10000.0, None, 300)
    qkv, d_out = torch.randn(sum(LENGTHS), spec.row_size), torch.randn(sum(LENGTHS), 6 * 64)
    ranks = deal(LENGTHS, CUTS, OWNERS, 3)
    results = []
    for count in (1, 2):
        threads(count)
        results.append(gradients(qkv, spec, rope, LENGTHS, d_out, ranks, norms_of(spec, torch.float32)))
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b, "gradient")


def test_a_rank_without_rows_computes_nothing_and_has_zero_gradients() -> None:
    spec = AttentionSpec(2, 1, 32)
    kv_plan = plan_of([20, 5])
    plan = segments_plan(kv_plan, [])
    q, kv = torch.empty(0, 64, requires_grad=True), torch.randn(25, 64, requires_grad=True)
    norms = norms_of(spec, torch.float32)
    for backend in ("cpu", "torch"):
        with use_backend(backend):
            out = attention(q, spec, rope_table(32, 1e4, None, 64), plan, None, None, *norms, kv=kv)
            assert out.shape == (0, 64)
            d_q, d_kv = torch.autograd.grad(out, [q, kv], torch.empty(0, 64))
        assert d_q.shape == (0, 64)
        assert torch.equal(d_kv, torch.zeros(25, 64))
        assert all(torch.equal(norm.grad_buffer(), torch.zeros(32)) for norm in norms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_backend_agrees_with_the_kernel(dtype: torch.dtype) -> None:
    spec = AttentionSpec(6, 2, 48, window=50)
    rope = rope_table(48, 10000.0, None, 300)
    qkv, d_out = torch.randn(sum(LENGTHS), spec.row_size).to(dtype), torch.randn(sum(LENGTHS), 6 * 48).to(dtype)
    results = []
    for backend in ("cpu", "torch"):
        with use_backend(backend):
            norms = norms_of(spec, dtype)
            kv_plan = plan_of(LENGTHS)
            plan = segments_plan(kv_plan, deal(LENGTHS, CUTS, OWNERS, 3)[1])
            q, kv = (x.requires_grad_() for x in apart(qkv, spec, plan))
            out = attention(q, spec, rope, plan, None, None, *norms, kv=kv)
            out.backward(d_out[plan.rows()])
            results.append([out.detach(), q.grad, kv.grad, *(norm.grad for norm in norms)])
    tolerance = 2e-5 if dtype == torch.float32 else 4e-2
    for a, b in zip(*results, strict=True):
        assert a is not None and b is not None
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


def test_graph_replay_equals_eager_for_whatever_the_plans_hold() -> None:
    spec = AttentionSpec(6, 2, 32)
    rope = rope_table(32, 10000.0, None, 300)
    tables = torch.randperm(16, dtype=torch.int32).view(1, 16)
    q, kv = torch.zeros(64, 6 * 32), torch.zeros(96, 4 * 32)
    pools = [allocate_pages(16, 16, spec, torch.float32) for _ in range(2)]
    kv_plan = plan_of([1], [1], tables)
    plan = segments_plan(kv_plan, [(0, 1)])
    with Graph() as graph:
        out = attention(q, spec, rope, plan, *pools[0], kv=kv)
    context = 0
    for new, segments in ((96, [(0, 20), (60, 96)]), (30, [(29, 30)]), (1, [(0, 1)]), (64, [(0, 64)])):
        context += new
        whole = torch.randn(new, spec.row_size)
        kv_plan.build(int32([0, new]), int32([context]), torch.arange(context - new, context, dtype=torch.int32),
                      tables, 16)  # fmt: skip
        plan.build_segments(int32([b for b, _ in segments]), int32([e for _, e in segments]))
        q[: plan.num_tokens], kv[:new] = apart(whole, spec, plan)
        graph.replay(plan.num_tokens)
        expected = attention(whole, spec, rope, kv_plan, *pools[1])[plan.rows()]
        assert_same_bits(out[: plan.num_tokens], expected, f"replay of {segments}")


def test_queries_may_be_columns_of_wider_rows() -> None:
    spec = AttentionSpec(4, 2, 32)
    rope = rope_table(32, 1e4, None, 64)
    qkv = torch.randn(40, spec.row_size)
    kv_plan = plan_of([40])
    plan = segments_plan(kv_plan, [(10, 30)])
    out = attention(qkv[10:30, :128], spec, rope, plan, kv=qkv[:, 128:])
    assert_same_bits(out, attention(qkv, spec, rope, kv_plan)[10:30], "columns")


def test_bad_input_is_refused_by_name() -> None:
    spec = AttentionSpec(4, 2, 32)
    rope = rope_table(32, 1e4, None, 64)
    kv_plan = plan_of([10, 20])
    plan = segments_plan(kv_plan, [(2, 10), (15, 30)])
    q, kv = torch.randn(23, 128), torch.randn(30, 128)
    for segments in ([(5, 12)], [(5, 8), (7, 9)], [(3, 3)], [(25, 31)], [(30, 31)], [(-1, 2)]):
        with pytest.raises(InputError, match="segment"):
            segments_plan(kv_plan, segments)
    with pytest.raises(InputError, match="1 begins and 2 ends"):
        AttentionPlan(kv_plan).build_segments(int32([0]), int32([1, 2]))
    with pytest.raises(InputError, match="no other plan's rows"):
        plan_of([10]).build_segments(int32([0]), int32([1]))
    with pytest.raises(InputError, match="needs kv"):
        attention(torch.randn(23, spec.row_size), spec, rope, plan)
    with pytest.raises(InputError, match="one of queries alone"):
        attention(q, spec, rope, kv_plan, kv=kv)
    with pytest.raises(InputError, match=r"kv is torch\.float32 \(30, 64\)"):
        attention(q, spec, rope, plan, kv=kv[:, :64])
    with pytest.raises(InputError, match=r"qkv is torch\.float32 \(23, 64\)"):
        attention(q[:, :64], spec, rope, plan, kv=kv)
    with pytest.raises(InputError, match="kv has 29 rows and its plan 30"):
        attention(q, spec, rope, plan, kv=kv[:29])
    with pytest.raises(ValueError, match="qkv has 22 rows"):
        attention(q[:22], spec, rope, plan, kv=kv)
    kv_plan.build(int32([0, 30]), int32([30]), torch.arange(30, dtype=torch.int32))
    with pytest.raises(ValueError, match="build both for this batch, keys first"):
        attention(q, spec, rope, plan, kv=kv)


def test_a_plan_of_keys_built_anew_before_the_backward_is_refused() -> None:
    spec = AttentionSpec(2, 1, 32)
    kv_plan = plan_of([10])
    plan = segments_plan(kv_plan, [(4, 10)])
    out = attention(torch.randn(6, 64, requires_grad=True), spec, rope_table(32, 1e4, None, 64), plan,
                    kv=torch.randn(10, 64))  # fmt: skip
    kv_plan.build(int32([0, 10]), int32([10]), torch.arange(10, dtype=torch.int32))
    with pytest.raises(InputError, match="built anew"):
        out.sum().backward()
