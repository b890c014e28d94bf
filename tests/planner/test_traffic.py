"""The planner's traffic is what the collectives send, counted where it leaves for torch.distributed."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from engine.config import EngineConfig, ParallelConfig
from engine.model import Transformer
from engine.parallel.collectives import all_reduce
from engine.parallel.tensor import sum_shared_rows
from engine.planner import traffic
from engine.planner.machine import Machine
from engine.planner.plan import make_plan, world_size
from tests.planner.fake_ranks import fake_rank, measure
from tests.planner.test_footprint import share_of
from tests.tiny import tiny_config


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("tokens", [37, 300], ids=["one-shot sums", "two-step sums"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("axes", [{"tp": 2}, {"tp": 4}, {"tp": 2, "pp": 2}], ids=["tp2", "tp4", "tp2pp2"])
def test_tensor_parallel_traffic_of_a_micro_batch_is_what_is_sent(
    axes: dict, sequence_parallel: bool, dtype: str, tokens: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    parallel = ParallelConfig(dp=1, sequence_parallel=sequence_parallel, **axes)
    model = tiny_config("SeedOssForCausalLM", num_hidden_layers=3)
    config = EngineConfig(
        dtype=dtype, parallel=parallel, train_batch_tokens=tokens, activation_checkpointing=checkpointing
    )
    for rank in range(0, world_size(parallel), parallel.tp):
        found = measure(model, config, rank, monkeypatch)
        items = traffic.step_traffic(found.share, micro_batches=1)
        planned = {item.kind: item.num_bytes for item in items}
        sent = found.forward_bytes + found.backward_bytes
        assert planned["forward: rows and partial sums"] + planned["backward: rows and partial sums"] == sent
        if not checkpointing:
            assert planned["forward: rows and partial sums"] == found.forward_bytes


@pytest.mark.parametrize("lanes", [2, 4])
@pytest.mark.parametrize("sequence_tokens", [64, 40, 16], ids=["one cut", "several", "none cut"])
def test_context_parallel_traffic_is_what_is_sent(
    sequence_tokens: int, lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_config("LlamaForCausalLM")
    config = EngineConfig(parallel=ParallelConfig(dp=1, cp=2, context_lanes=lanes), train_batch_tokens=64)
    for rank in range(2):
        found = measure(model, config, rank, monkeypatch, sequence_tokens)
        items = [item for item in traffic.step_traffic(found.share, micro_batches=1) if item.axis == "cp"]
        assert sum(item.num_bytes for item in items) == found.forward_bytes + found.backward_bytes
        assert sum(item.num_bytes for item in items if "gradients" in item.kind) == found.backward_bytes


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("tp", [2, 4], ids=["tp2", "tp4 replicates key heads"])
def test_traffic_of_shared_gradients_is_what_is_sent(
    tp: int, sequence_parallel: bool, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parallel = ParallelConfig(dp=1, tp=tp, sequence_parallel=sequence_parallel)
    share = share_of(tiny_config(architecture), EngineConfig(parallel=parallel))
    sent = _count_sends(monkeypatch)
    model = Transformer(share.model, torch.float32, share.placement)
    shared = [(p.weight.grad_buffer()[p.row : p.row + p.rows], p.holders) for p in model.partial_gradients()]
    with fake_rank(parallel, 0) as mesh:
        sum_shared_rows(shared, mesh.tp)
    assert sum(sent) == traffic.shared_gradient_bytes(share)


@pytest.mark.parametrize("elements", [7, 16384, 16385, 100_003])
@pytest.mark.parametrize("ranks", [2, 3])
def test_all_reduce_sends_what_is_counted(ranks: int, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = _count_sends(monkeypatch)
    with fake_rank(ParallelConfig(dp=1, tp=ranks), 0) as mesh:
        all_reduce(torch.zeros(elements), mesh.tp)
    assert sum(sent) == traffic.reduce_bytes(elements, 4, ranks)


def test_a_pipeline_sends_each_stream_on_and_each_gradient_back() -> None:
    model = tiny_config(num_hidden_layers=8)
    parallel = ParallelConfig(dp=1, pp=4)
    config = EngineConfig(parallel=parallel, train_batch_tokens=10)
    tensor = 10 * model.hidden_size * 2
    sends = [traffic.pipeline_bytes(share_of(model, config, rank), 5) for rank in range(4)]
    assert [num_bytes // tensor for num_bytes in sends] == [5, 10, 10, 5]


def test_interleaved_chunks_send_between_the_ends_of_the_pipeline_too() -> None:
    from engine.parallel.schedule import schedule, transfers

    model = tiny_config(num_hidden_layers=8)
    parallel = ParallelConfig(dp=1, pp=4, schedule="interleaved", virtual_stages=2)
    config = EngineConfig(parallel=parallel, train_batch_tokens=10)
    listed = transfers(schedule("interleaved", 4, 8, 2))
    for rank in range(4):
        sends = traffic.pipeline_bytes(share_of(model, config, rank), 8)
        assert sends == sum(transfer.sends for transfer in listed[rank]) * 10 * model.hidden_size * 2


def test_one_rank_sends_nothing() -> None:
    assert make_plan(tiny_config(), EngineConfig(parallel=ParallelConfig(dp=1)), Machine()).traffic == [[]]


def _count_sends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sent: list[int] = []
    real = dist.all_to_all_single

    def counted(out: torch.Tensor, x: torch.Tensor, *splits: object, group: object, async_op: bool) -> object:
        ranks = dist.get_world_size(group)
        sent.append(x.numel() * x.element_size() * (ranks - 1) // ranks)
        return real(out, x, *splits, group=group, async_op=async_op)

    monkeypatch.setattr(dist, "all_to_all_single", counted)
    return sent
