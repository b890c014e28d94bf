"""One process that takes itself for a rank of many: collectives return at once, with whatever memory held before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from engine.batch import TokenBatch
from engine.config import EngineConfig, ModelConfig, ParallelConfig
from engine.model import Transformer
from engine.parallel.context import choose_rows
from engine.parallel.mesh import Mesh, make_mesh
from engine.parallel.shards import Placement
from engine.planner.plan import world_size
from engine.planner.share import DTYPES, Share
from engine.side_by_side import SideBySide


@contextmanager
def fake_rank(parallel: ParallelConfig, rank: int) -> Iterator[Mesh]:
    """The mesh that `make_mesh` gives a rank of a world as large as `parallel` says."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size(parallel))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("engine.parallel.mesh.connect", lambda timeout: None)  # there is nobody to watch
            mesh = make_mesh(parallel)
        yield mesh
    finally:
        dist.destroy_process_group()


@dataclass
class Measured:
    """What a forward and backward of one micro-batch in chunk 0 really did."""

    saved_bytes: int
    forward_bytes: int  # sent to other ranks
    backward_bytes: int
    share: Share


def measure(
    model: ModelConfig,
    config: EngineConfig,
    rank: int,
    monkeypatch: pytest.MonkeyPatch,
    sequence_tokens: int = 0,
) -> Measured:
    """Runs a rank's first chunk with its part of `train_batch_tokens` tokens; counts the storages that autograd and
    activation checkpointing keep, and what is handed to all-to-alls for other ranks."""
    parallel, sent = config.parallel, [0]
    all_to_all, kept = dist.all_to_all_single, {}

    def counted(out: Tensor, x: Tensor, receive: object = None, send: list | None = None, **options: Any) -> object:
        ranks, own = dist.get_world_size(options["group"]), dist.get_rank(options["group"])
        pieces = send or [x.numel() // ranks] * ranks
        sent[0] += (sum(pieces) - pieces[own]) * x.element_size()
        return all_to_all(out, x, receive, send, **options)

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
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
        whole = config.train_batch_tokens
        length = sequence_tokens or whole
        share = Share(model, config, placement, length)
        sequences = [[i % model.vocab_size for i in range(min(length, whole - at))] for at in range(0, whole, length)]
        batch = TokenBatch.lanes(sequences, scattered, mesh.cp, share.context_lanes)
        lanes = SideBySide(built, share.context_lanes)
        stream = None if share.is_first else torch.randn(share.S, share.D).to(built.dtype).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = lanes.forward(batch, stream, 0)
            if built.chunks[0].last:
                choice = choose_rows(torch.arange(whole), batch[0].context)
                targets, temperature = torch.zeros(share.T, dtype=torch.int32), torch.ones(share.T)
                predicted = lanes.token_logprob(choice.take(out), targets, temperature, choice.counts)
                out = torch.stack(choice.whole(*predicted))
        forward, sent[0] = sent[0], 0
        out.float().sum().backward()
        saved = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept.values()}
        return Measured(sum(saved.values()), forward, sent[0], share)
