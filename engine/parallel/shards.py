"""Which part of a model a rank holds: arithmetic alone, shared by the model, checkpoints and the planner."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.kernels.weight import PANEL
from engine.parallel.mesh import Mesh


@dataclass(frozen=True)
class Placement:
    """Where a model's parts go: the mesh, how many chunks of layers each pipeline stage has, and whether the rows of
    norms and residuals are dealt over tensor-parallel ranks in training and scoring."""

    mesh: Mesh = field(default_factory=Mesh.single)
    chunks_per_stage: int = 1
    sequence_parallel: bool = False


@dataclass(frozen=True)
class Span:
    """Rows (or columns) [first, first + size) of something that has more of them."""

    first: int
    size: int

    @property
    def end(self) -> int:
        return self.first + self.size


@dataclass(frozen=True)
class HeadShard:
    """The attention heads of one tensor-parallel rank. With more ranks than key/value heads, `replicas` neighbours hold
    the same one; `owned` is True on the first of them."""

    heads: Span
    kv_heads: Span
    replicas: int
    owned: bool


def head_shard(config: ModelConfig, num_shards: int, index: int) -> HeadShard:
    """Query heads in equal shares, key/value heads with the queries that read them. Raises ConfigError."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % num_shards or (kv_heads % num_shards and num_shards % kv_heads):
        raise ConfigError(
            f"tp is {num_shards}, but the model has {heads} attention heads and {kv_heads} key/value heads; tp must "
            "divide the former, and divide the latter or be a multiple of it"
        )
    share = heads // num_shards
    replicas = max(1, num_shards // kv_heads)
    kv_share = max(1, kv_heads // num_shards)
    return HeadShard(
        heads=Span(index * share, share),
        kv_heads=Span(index // replicas * kv_share, kv_share),
        replicas=replicas,
        owned=index % replicas == 0,
    )


def row_share(rows: int, num_shares: int, index: int) -> Span:
    """A share of rows, in whole panels as far as possible: the last may be smaller, and of few rows some are empty."""
    panels = -(-rows // PANEL)
    low, high = (min(rows, panels * i // num_shares * PANEL) for i in (index, index + 1))
    return Span(low, high - low)


def row_shard(rows: int, num_shards: int, index: int) -> Span:
    """A share of rows for a tensor-parallel rank. Raises ConfigError where it would be empty."""
    span = row_share(rows, num_shards, index)
    if not span.size:
        raise ConfigError(
            f"{rows} rows in panels of {PANEL} leave nothing for rank {index} of tp {num_shards}; choose a smaller tp"
        )
    return span


def layer_chunks(num_layers: int, num_stages: int, chunks_per_stage: int, stage: int) -> list[range]:
    """The layers of each chunk of a pipeline stage: virtual stage c * num_stages + stage is its chunk c. Layers are
    dealt as evenly as possible, the first virtual stages taking what is left over. Raises ConfigError."""
    virtual = num_stages * chunks_per_stage
    if num_layers < virtual:
        raise ConfigError(
            f"{num_layers} layers cannot be dealt to {virtual} pipeline stages (pp {num_stages}, {chunks_per_stage} "
            "chunks on each); choose a smaller parallel.pp or virtual_stages"
        )
    share, rest = divmod(num_layers, virtual)

    def first(index: int) -> int:
        return index * share + min(index, rest)

    numbers = [chunk * num_stages + stage for chunk in range(chunks_per_stage)]
    return [range(first(number), first(number + 1)) for number in numbers]
