"""What a rank of a mesh will hold, in bytes, before anything is started: each figure from a function that says how.

Sizes come from the functions that the engine itself lays weights out with (`shards.py`, `kernels/weight.py`), so a plan
and the ranks it describes cannot disagree on them.

# T tokens of a micro-batch, S rows of it that a rank keeps between matmuls, D model width, V vocabulary, H query heads,
# K key/value heads, Dh head width, I feed-forward width; H, K and I are a rank's; e bytes of an element of the dtype
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from engine.architectures import architecture_of
from engine.config import EngineConfig, ModelConfig, ParallelConfig
from engine.errors import ConfigError, nearest
from engine.kernels.attention import AttentionSpec, page_shapes
from engine.kernels.memory import num_bytes
from engine.kernels.token_logprob import LOGITS_ELEMENTS
from engine.kernels.weight import storage_shape
from engine.parallel.collectives import Group
from engine.parallel.mesh import AXES, Mesh
from engine.parallel.schedule import peak_activations, schedule
from engine.parallel.shards import Placement, head_shard, layer_chunks, row_shard

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FP32 = 4  # bytes


@dataclass(frozen=True)
class Held:
    """A kind of weight that a rank holds, and how many of it. A matmul reads it where `packed`."""

    name: str
    shape: tuple[int, ...]
    packed: bool
    count: int = 1

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape) * self.count


@dataclass(frozen=True)
class RankPlan:
    """Bytes on one rank by kind, and what a token costs in its KV pool."""

    stage: int
    layers: tuple[range, ...]
    num_parameters: int
    kinds: dict[str, int]
    in_flight: int  # micro-batches times chunks whose activations are kept at the peak
    kv_token_bytes: int

    @property
    def num_bytes(self) -> int:
        return sum(self.kinds.values())

    def kv_tokens(self, memory_bytes: int, page_size: int) -> int:
        """Tokens whose keys and values fit beside everything else, in whole pages:
        floor((memory - bytes) / (page_size * bytes per token)) * page_size, and no fewer than 0."""
        return max(0, (memory_bytes - self.num_bytes) // (page_size * self.kv_token_bytes)) * page_size


def parse_mesh(text: str, **more: object) -> ParallelConfig:
    """"tp=8,pp=3,dp=8" (any of dp, pp, cp, tp; 1 where left out) as a ParallelConfig with the keys `more`.

    Raises ConfigError for an unknown axis, with the nearest known one, and for what is no number above 0.
    """
    sizes = dict.fromkeys(AXES, 1)
    seen: set[str] = set()
    for item in filter(None, (piece.strip() for piece in text.split(","))):
        axis, _, value = (piece.strip() for piece in item.partition("="))
        if axis not in AXES:
            raise ConfigError(
                f'the mesh "{text}" has an axis "{axis}"{nearest(axis, list(AXES))}; write it like tp=8,pp=3,dp=8, '
                f"with axes out of {', '.join(AXES)}"
            )
        if axis in seen or not value.isdecimal() or int(value) < 1:
            raise ConfigError(
                f'the mesh "{text}" has {"a second " if axis in seen else ""}{item}; each axis is given once, as a '
                "number of ranks from 1 on"
            )
        seen.add(axis)
        sizes[axis] = int(value)
    return ParallelConfig(**{**sizes, **more})  # type: ignore[arg-type]


def world_size(parallel: ParallelConfig) -> int:
    """dp * pp * cp * tp, with dp = 0 as 1."""
    return max(1, parallel.dp) * parallel.pp * parallel.cp * parallel.tp


def placement_of(parallel: ParallelConfig, stage: int, tp_index: int = 0, data_index: int = 0) -> Placement:
    """Where one rank stands, with groups that know sizes and places but no ranks to talk to."""

    def group(name: str, size: int, index: int) -> Group:
        return Group(name, tuple(range(size)), index)

    data = max(1, parallel.dp) * parallel.cp
    mesh = Mesh(
        dp=group("dp", max(1, parallel.dp), data_index // parallel.cp),
        pp=group("pp", parallel.pp, stage),
        cp=group("cp", parallel.cp, data_index % parallel.cp),
        tp=group("tp", parallel.tp, tp_index),
        data=group("data", data, data_index),
    )
    return Placement(mesh, parallel.chunks_per_stage, parallel.sequence_parallel and parallel.tp > 1)


def rank_plan(model: ModelConfig, config: EngineConfig, placement: Placement) -> RankPlan:
    """Every kind of bytes on the rank at `placement`. Raises ConfigError where the model cannot be placed so."""
    held = held_weights(model, placement)
    dtype = DTYPES[config.dtype]
    in_flight = activations_in_flight(config.parallel, placement.mesh.pp.index)
    kinds = {
        "weights": weight_bytes(held, dtype),
        "gradients": gradient_bytes(held),
        "gradient sums": share_bytes(held, placement.mesh.data),
        "optimizer": 3 * share_bytes(held, placement.mesh.data),
        "activations": kept_bytes(model, config, placement, in_flight),
        "working memory": working_bytes(model, config, placement),
        "logits": logits_bytes(model, config, placement),
        "rotary table": num_bytes((model.max_position_embeddings, model.head_dim), torch.float32),
    }
    return RankPlan(
        stage=placement.mesh.pp.index,
        layers=tuple(_chunks(model, placement)),
        num_parameters=sum(weight.num_elements for weight in held),
        kinds=kinds,
        in_flight=in_flight,
        kv_token_bytes=kv_token_bytes(model, config, placement),
    )


def heaviest_rank(model: ModelConfig, config: EngineConfig, stage: int) -> RankPlan:
    """The plan of the rank of a pipeline stage that has most to hold: shares of rows and of optimizer state differ by
    a panel between ranks. Raises ConfigError."""
    tp, data = config.parallel.tp, max(1, config.parallel.dp) * config.parallel.cp
    shards = [rank_plan(model, config, placement_of(config.parallel, stage, index)) for index in range(tp)]
    index = max(range(tp), key=lambda i: shards[i].num_bytes)
    ranks = (rank_plan(model, config, placement_of(config.parallel, stage, index, place)) for place in range(data))
    return max(ranks, key=lambda rank: rank.num_bytes)
