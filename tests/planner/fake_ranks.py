"""One process that takes itself for a rank of many: collectives return at once, with whatever memory held before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from engine.batch import TokenBatch
from engine.config import EngineConfig, ModelConfig, ParallelConfig
from engine.model import Transformer
from engine.parallel.mesh import Mesh, make_mesh
from engine.parallel.shards import Placement
from engine.planner.footprint import DTYPES, micro_batch_rows
from engine.planner.plan import world_size


@contextmanager
def fake_rank(parallel: ParallelConfig, rank: int) -> Iterator[Mesh]:
    """The mesh that `make_mesh` gives a rank of a world as large as `parallel` says."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size(parallel))
    try:
        yield make_mesh(parallel)
    finally:
        dist.destroy_process_group()


@dataclass
class Measured:
    """What a forward and backward of one micro-batch in chunk 0 really did."""

    saved_bytes: int
    forward_bytes: int  # sent to other ranks
    backward_bytes: int
    placement: Placement


def measure(model: ModelConfig, config: EngineConfig, rank: int, monkeypatch: pytest.MonkeyPatch) -> Measured:
    """Runs a rank's first chunk with `train_batch_tokens` tokens; counts tensors that autograd and activation
    checkpointing keep, each storage once, and what is handed to all-to-alls for other ranks."""
    parallel, sent = config.parallel, [0]
    all_to_all, kept = dist.all_to_all_single, {}

    def counted(out: Tensor, x: Tensor, *splits: object, group: object, async_op: bool) -> object:
        ranks = dist.get_world_size(group)
        sent[0] += x.numel() * x.element_size() * (ranks - 1) // ranks
        return all_to_all(out, x, *splits, group=group, async_op=async_op)

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    def checkpointed(layer: object, *inputs: object, **options: object) -> object:
        for tensor in inputs:
            if isinstance(tensor, Tensor):
                keep(tensor)
        return original(layer, *inputs, **options)

    import engine.model

    original = engine.model.checkpoint
    with monkeypatch.context() as patch, fake_rank(parallel, rank) as mesh:
        patch.setattr(dist, "all_to_all_single", counted)
        patch.setattr(engine.model, "checkpoint", checkpointed)
        scattered = parallel.sequence_parallel and parallel.tp > 1
        placement = Placement(mesh, parallel.chunks_per_stage, scattered)
        built = Transformer(model, DTYPES[config.dtype], placement)
        built.initialize(0)
        built.checkpointing = config.activation_checkpointing
        tokens, rows = micro_batch_rows(config, placement)
        batch = TokenBatch.packed([[i % model.vocab_size for i in range(tokens)]], scattered=scattered)
        stream = None if mesh.pp.index == 0 else torch.randn(rows, model.hidden_size).to(built.dtype).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = built.forward(batch, stream)
            if built.chunks[0].last:
                targets, temperature = torch.zeros(tokens, dtype=torch.int32), torch.ones(tokens)
                out = torch.stack(built.token_logprob(out, targets, temperature))
        forward, sent[0] = sent[0], 0
        out.float().sum().backward()
        return Measured(sum(kept.values()), forward, sent[0], placement)
