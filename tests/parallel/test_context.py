"""Context parallelism: rows dealt evenly, and the bits of one rank wherever a row is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine import Engine, EngineConfig, Sample, SamplingParams
from engine.config import ParallelConfig
from engine.parallel.collectives import Group
from engine.parallel.context import ContextShard, choose_rows, deal_rows
from engine.parallel.mesh import Mesh
from engine.sampler import runner
from tests.parallel.gradients import whole_gradients
from tests.parallel.pool import Pool
from tests.tiny import FAMILIES, tiny_config

# ---- the deal ----

batches = st.lists(st.integers(1, 5000), min_size=1, max_size=12)
sizes = st.integers(1, 8)


@given(batches, sizes)
@settings(deadline=None)
def test_every_row_is_dealt_once_and_in_order(lengths: list[int], size: int) -> None:
    deal = deal_rows(lengths, size)
    rows = [row for segments in deal.segments for begin, end in segments for row in range(begin, end)]
    assert sorted(rows) == list(range(sum(lengths)))
    for segments in deal.segments:
        assert segments == sorted(segments)
        assert all(begin < end for begin, end in segments)


@given(batches, sizes)
@settings(deadline=None)
def test_a_sequence_that_is_not_cut_is_whole_on_one_rank(lengths: list[int], size: int) -> None:
    deal = deal_rows(lengths, size)
    starts = [sum(lengths[:s]) for s in range(len(lengths) + 1)]
    everything = [segment for segments in deal.segments for segment in segments]
    for s, cut in enumerate(deal.cut):
        assert cut or (starts[s], starts[s + 1]) in everything


def work(segments: list[tuple[int, int]], lengths: list[int], token_work: int) -> float:
    """Keys that the rows of `segments` see, and `token_work` for each row."""
    starts = [sum(lengths[:s]) for s in range(len(lengths) + 1)]
    total = 0.0
    for begin, end in segments:
        start = max(s for s in starts if s <= begin)
        total += (end - begin) * token_work + ((end - start) ** 2 - (begin - start) ** 2) / 2
    return total


@given(st.lists(st.integers(200, 100_000), min_size=1, max_size=12), sizes, st.integers(0, 100_000))
@settings(deadline=None)
def test_ranks_have_nearly_the_same_work(lengths: list[int], size: int, before: int) -> None:
    """In matmuls and attention together; where everything is cut, in attention alone too."""
    deal = deal_rows(lengths, size, [before] * len(lengths))
    loads = [work(segments, lengths, 8192 + before) for segments in deal.segments]
    assert max(loads) <= 1.101 * sum(loads) / size
    if all(deal.cut):
        attention = [work(segments, lengths, 0) for segments in deal.segments]
        assert max(attention) <= 1.1 * sum(attention) / size


def test_one_long_sequence_is_dealt_in_causal_halves() -> None:
    deal = deal_rows([800], 4)
    assert deal.segments == [[(0, 100), (700, 800)], [(100, 200), (600, 700)], [(200, 300), (500, 600)], [(300, 500)]]


def test_sequences_stay_whole_where_that_is_even() -> None:
    deal = deal_rows([100, 50, 30, 20, 100], 2)
    assert deal.cut == [False] * 5
    assert sorted(len(segments) for segments in deal.segments) == [2, 3]


def test_only_the_longest_is_cut_where_it_alone_is_too_long() -> None:
    assert deal_rows([40, 4000, 40, 40, 40], 2).cut == [False, True, False, False, False]


def test_a_rank_holds_keys_of_cut_sequences_and_of_its_own() -> None:
    lengths = [40, 4000, 40, 40, 40]
    deal = deal_rows(lengths, 2)
    shards = [ContextShard(Group("cp", (0, 1), index), deal, lengths) for index in range(2)]
    lanes = [lane for shard in shards for lane in shard.lanes]
    assert [lane.num_keys for lane in lanes] == [4080, 4080]
    assert [shard.counts for shard in shards] == [[2000, 2000]] * 2
    assert torch.equal(torch.cat([lane.rows for lane in lanes]).sort().values, torch.arange(sum(lengths)))
    for index, lane in enumerate(lanes):
        assert lane.plan.num_tokens == len(lane.rows)
        assert (shards[0].owner[lane.rows] == index).all()


def test_a_rank_plays_the_lanes_that_ranks_of_their_own_would() -> None:
    lengths = [40, 4000, 40, 40, 40]
    deal = deal_rows(lengths, 4)
    apart = [ContextShard(Group("cp", (0, 1, 2, 3), index), deal, lengths) for index in range(4)]
    together = [ContextShard(Group("cp", (0, 1), index), deal, lengths) for index in range(2)]
    assert [shard.first_lane for shard in together] == [0, 2]
    assert together[0].counts == [apart[0].counts[0] + apart[0].counts[1], apart[0].counts[2] + apart[0].counts[3]]
    for ours, alone in zip((lane for shard in together for lane in shard.lanes), apart, strict=True):
        (lane,) = alone.lanes
        assert ours.num_keys == lane.num_keys
        for name in ("rows", "moving", "staying", "received_at", "staying_at"):
            assert torch.equal(getattr(ours, name), getattr(lane, name)), name


def test_chosen_rows_are_found_where_they_are() -> None:
    lengths = [9, 4000, 7]
    deal = deal_rows(lengths, 2)
    rows = torch.tensor([0, 8, 9, 1500, 3000, 4008, 4015])
    for ranks in ((0, 1), (0,)):  # each with a lane, one with both
        found = []
        for index in ranks:
            shard = ContextShard(Group("cp", ranks, index), deal, lengths)
            choice = choose_rows(rows, shard)
            here = torch.cat([lane.rows for lane in shard.lanes])
            assert torch.equal(here[choice.local], rows[choice.mine])
            assert sum(choice.counts) == len(choice.mine)
            found.append(choice.mine)
        assert torch.equal(torch.cat(found).sort().values, torch.arange(len(rows)))


# ---- the engine ----


def engine_of(architecture: str, dtype: str, single: bool = False, parallel: dict[str, Any] | None = None,
              **settings: Any) -> Engine:  # fmt: skip
    config = EngineConfig(
        dtype=dtype, max_batch_tokens=64, max_seqs=8, threads=1, parallel=ParallelConfig(**(parallel or {})), **settings
    )
    mesh = Mesh.single() if single else None
    return Engine.from_config(tiny_config(architecture, initializer_range=0.2), config, mesh=mesh)


def samples_of(shapes: list[tuple[int, int]]) -> list[Sample]:
    """Samples of n tokens of which the last m count."""
    generator = torch.Generator().manual_seed(1)
    return [
        Sample(
            tokens=torch.randint(3, 300, (n,), generator=generator).tolist(),
            loss_mask=[0] * (n - m) + [1] * m,
            advantages=float(torch.randn(1, generator=generator)),
            old_logprobs=(-5 - torch.rand(n, generator=generator)).tolist(),
        )
        for n, m in shapes
    ]


SHAPES = [(300, 10), (7, 5), (90, 80), (2, 1), (33, 20)]


def scored_and_trained(architecture: str, dtype: str, loss: str, shapes: list[tuple[int, int]], single: bool,
                       parallel: dict[str, Any], **settings: Any) -> dict[str, Any]:  # fmt: skip
    engine = engine_of(architecture, dtype, single, parallel, **settings)
    samples = samples_of(shapes)
    scored = engine.score([sample.tokens for sample in samples], 0.8)
    stats = engine.forward_backward(samples, loss)
    gradients = [gradient.double() for gradient in whole_gradients(engine.trainer)]
    engine.close()
    return {"scored": scored, "logprobs": stats.logprobs, "loss": stats.loss, "metrics": stats.metrics,
            "gradients": gradients}  # fmt: skip


def assert_same_results(ours: dict[str, Any], one: dict[str, Any]) -> None:
    assert ours["loss"] == one["loss"]
    assert ours["metrics"] == one["metrics"]
    for name in ("scored", "logprobs"):
        for a, b in zip(ours[name], one[name], strict=True):
            assert torch.equal(a.view(torch.int32), b.view(torch.int32)), name


def largest_error(ours: list[Tensor], exact: list[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(ours, exact, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_losses_and_logprobs_have_the_bits_of_one_rank(pool2: Pool, architecture: str, dtype: str) -> None:
    for micro in ({}, {"train_batch_tokens": 100, "activation_checkpointing": True}):  # several micro-batches
        one = scored_and_trained(architecture, dtype, "dapo", SHAPES, True, {}, **micro)
        results = pool2.run(scored_and_trained, architecture, dtype, "dapo", SHAPES, False, {"cp": 2}, **micro)
        for ours in results:
            assert_same_results(ours, one)


def test_losses_over_whole_sequences_have_the_bits_of_one_rank(pool4: Pool) -> None:
    """GSPO's ratio is one of a whole sequence, which four ranks hold parts of."""
    one = scored_and_trained("Qwen3ForCausalLM", "bfloat16", "gspo", SHAPES, True, {}, train_batch_tokens=200)
    for ours in pool4.run(scored_and_trained, "Qwen3ForCausalLM", "bfloat16", "gspo", SHAPES, False, {"cp": 4},
                          train_batch_tokens=200):  # fmt: skip
        assert_same_results(ours, one)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_context_and_tensor_parallel_have_the_bits_of_tensor_parallel(
    pool2: Pool, pool4: Pool, sequence_parallel: bool
) -> None:
    arguments = ("Qwen2ForCausalLM", "bfloat16", "dapo", [*SHAPES, (3, 1)], False)
    parallel = {"tp": 2, "sequence_parallel": sequence_parallel}
    one = pool2.run(scored_and_trained, *arguments, parallel, train_batch_tokens=160)[0]
    for ours in pool4.run(scored_and_trained, *arguments, {**parallel, "cp": 2}, train_batch_tokens=160):
        assert_same_results(ours, one)


def test_a_rank_without_rows_takes_part(pool4: Pool) -> None:
    """Two tokens for four ranks: nobody waits for the others, and nothing is lost."""
    for parallel in ({"cp": 4}, {"cp": 2, "tp": 2}):
        one = scored_and_trained("Qwen3ForCausalLM", "float32", "sft", [(3, 2)], True, {})
        for ours in pool4.run(scored_and_trained, "Qwen3ForCausalLM", "float32", "sft", [(3, 2)], False, parallel):
            if parallel == {"cp": 4}:
                assert_same_results(ours, one)
            assert ours["loss"] == pytest.approx(one["loss"], rel=1e-6)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_gradients_add_up_to_those_of_one_rank(pool2: Pool, architecture: str) -> None:
    for micro in ({}, {"train_batch_tokens": 100}):
        one = scored_and_trained(architecture, "float64", "dapo", SHAPES, True, {}, **micro)
        for ours in pool2.run(scored_and_trained, architecture, "float64", "dapo", SHAPES, False, {"cp": 2}, **micro):
            assert largest_error(ours["gradients"], one["gradients"]) < 1e-10
            assert ours["loss"] == pytest.approx(one["loss"], rel=1e-10)


def test_gradients_add_up_over_four_ranks(pool4: Pool) -> None:
    for dtype, limit in (("float64", 1e-10), ("float32", 2e-6)):
        one = scored_and_trained("Qwen3ForCausalLM", dtype, "dapo", SHAPES, True, {})
        for ours in pool4.run(scored_and_trained, "Qwen3ForCausalLM", dtype, "dapo", SHAPES, False, {"cp": 4}):
            assert largest_error(ours["gradients"], one["gradients"]) < limit


def learn(architecture: str, single: bool, parallel: dict[str, Any]) -> dict[str, Any]:
    """Ten steps in float64."""
    engine = engine_of(architecture, "float64", single, parallel, train_batch_tokens=200)
    losses, norms = [], []
    for _ in range(10):
        losses.append(engine.forward_backward(samples_of(SHAPES), "dapo").loss)
        norms.append(engine.optim_step(1e-3).grad_norm)
    weights = [weight.dense() for weight in engine.model.weights()]
    engine.close()
    return {"losses": losses, "norms": norms, "weights": weights}


def assert_learned_alike(ranks: list[dict[str, Any]], one: dict[str, Any]) -> None:
    for ours in ranks:
        for name in ("losses", "norms"):
            assert ours[name] == pytest.approx(one[name], rel=1e-10, abs=1e-10), name
        if [w.shape for w in ours["weights"]] == [w.shape for w in one["weights"]]:  # not a shard, not a stage
            assert largest_error(ours["weights"], one["weights"]) < 1e-10


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "MistralForCausalLM"])
def test_ten_steps_agree_with_those_of_one_rank(pool2: Pool, architecture: str) -> None:
    one = learn(architecture, True, {})
    assert_learned_alike(pool2.run(learn, architecture, False, {"cp": 2}), one)


def test_ten_steps_agree_with_those_of_one_rank_on_four(pool4: Pool) -> None:
    one = learn("Qwen3ForCausalLM", True, {})
    for parallel in ({"cp": 4}, {"cp": 2, "tp": 2}, {"cp": 2, "dp": 2}, {"cp": 2, "pp": 2}):
        assert_learned_alike(pool4.run(learn, "Qwen3ForCausalLM", False, parallel), one)


def sampled_and_trained(dtype: str, single: bool, parallel: dict[str, Any], **sizes: Any) -> dict[str, Any]:
    """What is sampled and then trained on, with the rows of all but the smallest steps dealt out."""
    engine, sampled = sample(dtype, single, parallel, **sizes)
    stats = engine.forward_backward(sampled.pop("samples"), "dapo")
    engine.close()
    return {**sampled, "difference": stats.max_abs_logprob_difference}


def sample(dtype: str, single: bool, parallel: dict[str, Any], **sizes: Any) -> tuple[Engine, dict[str, Any]]:
    shares = []

    def counted(*arguments: Any) -> ContextShard:
        shares.append(ContextShard(*arguments))
        return shares[-1]

    before = runner.SHARED_ROWS, runner.ContextShard
    runner.SHARED_ROWS, runner.ContextShard = 8, counted  # type: ignore[misc, assignment]
    try:
        engine = engine_of("Qwen3ForCausalLM", dtype, single, parallel, **sizes)
        generator = torch.Generator().manual_seed(1)
        prompts = [torch.randint(3, 300, (length,), generator=generator).tolist() for length in (5, 200, 33, 16)]
        prompts.append(prompts[1][:96] + prompts[2])  # its beginning is in the cache, or comes to be
        groups = engine.generate(prompts, SamplingParams(n=2, max_tokens=12, seed=3, temperature=0.9, logprobs=2))
    finally:
        runner.SHARED_ROWS, runner.ContextShard = before  # type: ignore[misc]
    completions = [c for group in groups for c in group]
    samples = [Sample.from_completion(c.prompt_token_ids, c, 1.0 - i % 2, 0.9) for i, c in enumerate(completions)]
    return engine, {
        "tokens": [c.token_ids for c in completions],
        "top": [c.top_logprobs for c in completions],
        "sampled": [c.logprobs for c in completions],
        "samples": samples,
        "shares": [len(share.lanes[0].rows) for share in shares],
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prompts_computed_together_give_the_tokens_of_one_rank_and_are_trained_on_exactly(
    pool2: Pool, dtype: str
) -> None:
    for sizes in ({"kv_tokens": 2048}, {"kv_tokens": 272, "page_size": 16}):  # a pool that makes sequences yield
        one = sampled_and_trained(dtype, True, {}, **sizes)
        results = pool2.run(sampled_and_trained, dtype, False, {"cp": 2}, **sizes)
        rows = [sum(ours["shares"]) for ours in results]
        assert min(rows) > 130 and max(rows) < 1.2 * min(rows), f"rows of prompts on each rank: {rows}"
        for ours in results:
            assert ours["difference"] == 0.0
            assert ours["tokens"] == one["tokens"]
            assert ours["top"] == one["top"]
            assert all(map(torch.equal, ours["sampled"], one["sampled"]))


@pytest.mark.parametrize("other", ["pp", "tp"])
def test_prompts_are_computed_together_on_other_meshes_too(pool2: Pool, pool4: Pool, other: str) -> None:
    one = pool2.run(sampled_and_trained, "bfloat16", False, {other: 2}, kv_tokens=2048)[0]
    for ours in pool4.run(sampled_and_trained, "bfloat16", False, {other: 2, "cp": 2}, kv_tokens=2048):
        assert sum(ours["shares"]) > 130
        assert ours["difference"] == 0.0
        assert ours["tokens"] == one["tokens"]
        assert all(map(torch.equal, ours["sampled"], one["sampled"]))
