"""The accumulated gradient, as one rank would have it, from the ranks that each hold a share of its rows."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.parallel.collectives import all_reduce
from engine.trainer import Trainer


def whole_gradients(trainer: Trainer) -> list[Tensor]:
    """Of each of this rank's weights, in their order, after `forward_backward`; every rank calls it."""
    data, weights = trainer.model.mesh.data, trainer.model.weights()
    whole = {id(weight): torch.zeros_like(weight.grad_buffer()) for weight in weights}
    for bucket in trainer.reducer.shares.buckets:
        mine = [block for block, owner in zip(bucket.blocks, bucket.owners, strict=True) if owner == data.index]
        for block, own in zip(mine, bucket.own, strict=True):
            whole[id(block.weight)][block.row : block.row + block.rows] = own.grad_buffer()
    return [all_reduce(whole[id(weight)], data) for weight in weights]
