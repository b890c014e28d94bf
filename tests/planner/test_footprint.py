"""The planner's bytes are those of real allocations: whole models, all ranks of small meshes, 405B without memory."""

from __future__ import annotations

import math

import pytest
import torch

import engine.kernels.graph as graph
from engine.config import EngineConfig, ModelConfig, ParallelConfig
from engine.engine import Engine
from engine.kernels.op import cpu_missing
from engine.model import Transformer
from engine.parallel.shards import Placement
from engine.planner import footprint
from engine.planner.machine import Machine
from engine.planner.plan import make_plan, placement_of, world_size
from engine.planner.share import DTYPES, Share
from engine.types import Sample, SamplingParams
from tests.planner.fake_ranks import fake_rank, measure
from tests.tiny import FAMILIES, tiny_config

needs_extension = pytest.mark.skipif(bool(cpu_missing()), reason="weights are packed by the C++ extension alone")
LLAMA_405B = ModelConfig(
    vocab_size=128256,
    hidden_size=16384,
    intermediate_size=53248,
    num_hidden_layers=126,
    num_attention_heads=128,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131072,
)
TP8_PP3_DP8 = ParallelConfig(tp=8, pp=3, dp=8)
ODD = {"vocab_size": 299, "intermediate_size": 105, "hidden_size": 72, "head_dim": 16, "num_hidden_layers": 3}


def allocated(model: Transformer) -> tuple[int, int]:
    """Bytes of compute weights and of gradients, all of them made."""
    gradients = [weight.grad_buffer() for bucket in model.gradient_buckets() for weight in bucket]
    return model.nbytes(), sum(g.numel() * g.element_size() for g in gradients)


def share_of(model: ModelConfig, config: EngineConfig, rank: int = 0) -> Share:
    return Share(model, config, placement_of(config.parallel, rank), config.train_batch_tokens)


def planned(model: ModelConfig, config: EngineConfig, rank: int) -> tuple[int, int]:
    share = share_of(model, config, rank)
    return footprint.weight_bytes(footprint.held_weights(share), share.dtype), footprint.gradient_bytes(share)


@needs_extension
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True}, ODD], ids=["plain", "tied", "odd"])
def test_bytes_of_one_rank_equal_a_real_allocation(architecture: str, dtype: str, overrides: dict) -> None:
    config = tiny_config(architecture, **overrides)
    engine_config = EngineConfig(dtype=dtype, parallel=ParallelConfig(dp=1))
    model = Transformer(config, DTYPES[dtype])
    assert planned(config, engine_config, 0) == allocated(model)


MESHES = [
    ParallelConfig(dp=1, tp=2),
    ParallelConfig(dp=1, tp=4),
    ParallelConfig(dp=2, tp=2, pp=2),
    ParallelConfig(dp=1, pp=3),
    ParallelConfig(dp=1, cp=2, pp=2, schedule="interleaved", virtual_stages=2),
]


@needs_extension
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("parallel", MESHES, ids=lambda p: f"dp{p.dp}pp{p.pp}cp{p.cp}tp{p.tp}")
@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM", "SeedOssForCausalLM"])
def test_bytes_of_every_rank_of_a_mesh_equal_a_real_allocation(
    architecture: str, parallel: ParallelConfig, dtype: str
) -> None:
    """Vocabulary and feed-forward shards of unequal size, replicated key heads, leftover layers, a tied head apart."""
    config = tiny_config(architecture, num_hidden_layers=5, tie_word_embeddings=architecture == "Qwen2ForCausalLM")
    engine_config = EngineConfig(dtype=dtype, parallel=parallel)
    for rank in range(world_size(parallel)):
        model = Transformer(config, DTYPES[dtype], placement_of(parallel, rank))
        assert planned(config, engine_config, rank) == allocated(model), f"rank {rank}"


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("parallel", [
    ParallelConfig(dp=1),
    ParallelConfig(dp=1, tp=2),
    ParallelConfig(dp=1, tp=4),
    ParallelConfig(dp=1, tp=2, pp=2),
    ParallelConfig(dp=1, tp=2, pp=2, sequence_parallel=False),
], ids=["alone", "tp2", "tp4", "tp2pp2", "tp2pp2-all-rows"])  # fmt: skip
def test_activation_bytes_equal_what_autograd_saves(
    parallel: ParallelConfig, dtype: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cpu_missing():
        pytest.skip("the plain torch kernels save no statistics")
    model = tiny_config("Qwen3ForCausalLM", num_hidden_layers=5)
    config = EngineConfig(dtype=dtype, parallel=parallel, train_batch_tokens=37, activation_checkpointing=checkpointing)
    for rank in range(0, world_size(parallel), parallel.tp):
        found = measure(model, config, rank, monkeypatch)
        assert found.saved_bytes == footprint.chunk_activation_bytes(found.share, 0), f"rank {rank}"


@needs_extension
@pytest.mark.parametrize("lanes", [2, 4])
@pytest.mark.parametrize("sequence_tokens", [64, 40, 16], ids=["one cut", "several", "none cut"])
def test_context_parallel_activations_equal_what_autograd_saves(
    sequence_tokens: int, lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_config("LlamaForCausalLM")
    config = EngineConfig(parallel=ParallelConfig(dp=1, cp=2, tp=2, context_lanes=lanes), train_batch_tokens=64)
    for rank in (0, 2):
        found = measure(model, config, rank, monkeypatch, sequence_tokens)
        assert found.saved_bytes == footprint.chunk_activation_bytes(found.share, 0), f"rank {rank}"


@needs_extension
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_step_takes_the_memory_that_was_planned(
    dtype: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backward's own memory is an estimate, and blocks are rounded up by as much as a fifth."""
    config = _mid_size()
    engine_config = EngineConfig(
        dtype=dtype, train_batch_tokens=1024, activation_checkpointing=checkpointing, parallel=ParallelConfig(dp=1)
    )
    monkeypatch.setattr(graph, "_shared", graph.Pool())
    engine = Engine.from_config(config, engine_config)
    engine.forward_backward([Sample(tokens=[1] * 1024, loss_mask=[0] + [1] * 1023)])
    (rank,) = make_plan(config, engine_config, Machine()).stages
    expected = sum(rank.num_bytes[kind] for kind in ("activations", "backward", "logits"))
    assert 0.8 < graph._shared.nbytes / expected < 1.25


@needs_extension
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_recorded_forward_takes_the_memory_that_was_planned(dtype: str) -> None:
    config = _mid_size()
    engine_config = EngineConfig(dtype=dtype, kv_tokens=1024, max_batch_tokens=512, parallel=ParallelConfig(dp=1))
    engine = Engine.from_config(config, engine_config)
    engine.generate([[1, 2, 3]], SamplingParams(max_tokens=1))
    (recorded,) = engine.sampler.runner.recorded
    planned = footprint.sampling_bytes(share_of(config, engine_config))
    assert 0.8 < recorded.graph.pool.nbytes / (planned - footprint.SAMPLING_LOGITS_BYTES) < 1.25


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", [16, 64])
def test_kv_bytes_equal_the_pool_of_a_sampler(dtype: str, head_dim: int) -> None:
    config = tiny_config("Qwen3ForCausalLM", head_dim=head_dim)
    engine_config = EngineConfig(dtype=dtype, kv_tokens=512, page_size=32, parallel=ParallelConfig(dp=1))
    runner = Engine.from_config(config, engine_config).sampler.runner
    pool = sum(t.numel() * t.element_size() for t in (*runner.keys, *runner.values))
    planned = footprint.kv_token_bytes(share_of(config, engine_config))
    assert planned * engine_config.kv_tokens == pool


@needs_extension
def test_405b_on_192_ranks_is_laid_out_as_planned() -> None:
    """The replica of 24 ranks on the meta device: 405.85e9 parameters, each owned once, and the plan's bytes."""
    config = EngineConfig(parallel=TP8_PP3_DP8)
    owned = 0
    for rank in range(24):
        with torch.device("meta"):
            model = Transformer(LLAMA_405B, torch.bfloat16, placement_of(TP8_PP3_DP8, rank))
            assert planned(LLAMA_405B, config, rank) == allocated(model), f"rank {rank}"
        owned += sum(math.prod(part.shape) for part in model.parts() if part.owned)
    assert owned == 405_853_388_800


@needs_extension
@pytest.mark.parametrize("rank", [0, 8 + 5, 191], ids=["first stage", "middle stage", "last stage of the last replica"])
def test_a_rank_of_192_makes_the_mesh_and_the_model_that_were_planned(rank: int) -> None:
    """Through torch.distributed's own groups, of a process group without a network."""
    stage = make_plan(LLAMA_405B, EngineConfig(parallel=TP8_PP3_DP8), Machine()).stages[rank // 8 % 3]
    with fake_rank(TP8_PP3_DP8, rank) as mesh, torch.device("meta"):
        model = Transformer(LLAMA_405B, torch.bfloat16, Placement(mesh, 1, True))
        weights, gradients = allocated(model)
    assert (mesh.dp.index, mesh.pp.index, mesh.tp.index) == (rank // 24, rank // 8 % 3, rank % 8)
    assert (weights, gradients) == (stage.num_bytes["weights"], stage.num_bytes["gradients"])


def _mid_size() -> ModelConfig:
    return ModelConfig(
        vocab_size=500,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
    )
