"""The planner's shares of the optimizer are those of the engine, and so is what travels for them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from engine.config import EngineConfig, ModelConfig, OptimizerConfig, ParallelConfig
from engine.kernels.op import cpu_missing
from engine.model import Transformer
from engine.optim import AdamW
from engine.parallel.data import GradientReducer, in_place
from engine.parallel.ownership import Shares, row_blocks
from engine.parallel.shards import Placement
from engine.planner import optimizer, traffic
from engine.planner.footprint import held_weights
from engine.planner.plan import placement_of, world_size
from engine.planner.share import DTYPES, Share
from tests.planner.fake_ranks import fake_rank
from tests.planner.test_footprint import LLAMA_405B, TP8_PP3_DP8, share_of
from tests.tiny import tiny_config

needs_extension = pytest.mark.skipif(bool(cpu_missing()), reason="weights are packed by the C++ extension alone")
MESHES = [
    ParallelConfig(dp=1),
    ParallelConfig(dp=1, gradient_lanes=2),
    ParallelConfig(dp=3),
    ParallelConfig(dp=2, tp=4),
    ParallelConfig(dp=2, pp=2, tp=2),
    ParallelConfig(dp=1, cp=2, pp=3),
    ParallelConfig(dp=1, cp=2, context_lanes=4),
]


def shares_of(model: Transformer, lanes: int) -> Shares:
    """As the trainer makes them: `lanes` of gradients times those of contexts on a rank."""
    blocks, groups = row_blocks(model.parts()), model.gradient_buckets()
    return Shares(blocks, groups, model.mesh, in_place(model.mesh, lanes), model.tied_weights)


@needs_extension
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("parallel", MESHES, ids=lambda p: f"dp{p.dp}pp{p.pp}cp{p.cp}tp{p.tp}lanes{p.gradient_lanes}")
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_optimizer_of_every_rank_has_the_planned_bytes(
    architecture: str, parallel: ParallelConfig, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With blocks so small that a weight has several; a tied embedding whose copy is on the last stage."""
    monkeypatch.setattr("engine.parallel.ownership.BLOCK_ELEMENTS", 1 << 11)
    config = tiny_config(architecture, num_hidden_layers=5, tie_word_embeddings=architecture == "Qwen2ForCausalLM")
    engine_config = EngineConfig(dtype=dtype, parallel=parallel)
    for rank in range(world_size(parallel)):
        share = share_of(config, engine_config, rank)
        model = Transformer(config, DTYPES[dtype], share.placement)
        shares = shares_of(model, optimizer.num_lanes(share) * share.context_lanes)
        adamw = AdamW(shares, OptimizerConfig())
        adamw.allocate()
        kept = [t for m in adamw.state.values() for t in (m.master, m.exp_avg, m.exp_avg_sq)]
        assert optimizer.optimizer_bytes(share) == _bytes(kept), f"rank {rank}"
        grads = {id(w): w.grad_buffer() for w in model.weights()}
        sums = [w.grad_buffer() for bucket in shares.gradients for w in bucket.own]
        apart = 0 if optimizer.adds_in_place(share) else _bytes(sums)
        assert optimizer.gradient_sum_bytes(share) == apart and grads, f"rank {rank}"


@needs_extension
@pytest.mark.parametrize("rank", [0, 8, 191])
def test_optimizer_of_405b_has_the_planned_elements(rank: int) -> None:
    share = Share(LLAMA_405B, EngineConfig(parallel=TP8_PP3_DP8), placement_of(TP8_PP3_DP8, rank), 8192)
    with torch.device("meta"):
        own = shares_of(Transformer(LLAMA_405B, torch.bfloat16, share.placement), 8).own
        assert optimizer.owned(share).elements == sum(weight.grad_buffer().numel() for weight in own)


@pytest.mark.parametrize("data", [1, 2, 3, 8])
def test_what_ranks_step_is_the_whole_and_nothing_twice(data: int) -> None:
    share = share_of(tiny_config("Qwen3ForCausalLM"), EngineConfig(parallel=ParallelConfig(dp=data, tp=2)))
    each = optimizer.owned_by_each(share)
    assert sum(owned.elements for owned in each) == sum(weight.num_elements for weight in held_weights(share))


@needs_extension
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("parallel", MESHES[2:], ids=lambda p: f"dp{p.dp}pp{p.pp}cp{p.cp}tp{p.tp}")
def test_gradients_and_weights_travel_as_planned(
    parallel: ParallelConfig, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.parallel.ownership.BLOCK_ELEMENTS", 1 << 11)
    config = tiny_config(num_hidden_layers=5, tie_word_embeddings=tied)
    for rank in range(world_size(parallel)):
        share = share_of(config, EngineConfig(parallel=parallel), rank)
        items = {item.kind: item.num_bytes for item in traffic.step_traffic(share, micro_batches=1)}
        kinds = ("gradients to their owners", "gradients of shared rows", "the tied embedding's gradient")
        gradients, weights = _sent(config, parallel, rank, monkeypatch)
        assert gradients == sum(items.get(kind, 0) for kind in kinds), f"rank {rank}"
        assert weights == items.get("updated weights", 0), f"rank {rank}"


def _sent(config: ModelConfig, parallel: ParallelConfig, rank: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Bytes for one lane's gradients, and for the updated weights, counted where they leave."""
    sent = [0]
    all_to_all, isend = dist.all_to_all_single, dist.isend

    def exchanged(out: torch.Tensor, x: torch.Tensor, receive: object = None, send: list | None = None, **options):
        ranks, own = dist.get_world_size(options["group"]), dist.get_rank(options["group"])
        pieces = send or [x.numel() // ranks] * ranks
        sent[0] += (sum(pieces) - pieces[own]) * x.element_size()
        return all_to_all(out, x, receive, send, **options)

    def sending(x: torch.Tensor, *rest: object, **options: object):
        sent[0] += x.numel() * x.element_size()
        return isend(x, *rest, **options)

    with monkeypatch.context() as patch, fake_rank(parallel, rank) as mesh:
        patch.setattr(dist, "all_to_all_single", exchanged)
        patch.setattr(dist, "isend", sending)
        model = Transformer(config, torch.bfloat16, Placement(mesh, 1, parallel.tp > 1))
        each = max(1, parallel.context_lanes // parallel.cp)
        shares = shares_of(model, parallel.dp * each)
        reducer = GradientReducer(shares, mesh, parallel.dp, model.partial_gradients(), model.tied_weights, each)
        reducer.begin()
        reducer.begin_lane(1, [True] * parallel.dp)
        reducer.finish_lane()
        reducer.finish()
        gradients, sent[0] = sent[0], 0
        for bucket in shares.buckets:
            shares.start_publishing(bucket)()
        return gradients, sent[0]


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
