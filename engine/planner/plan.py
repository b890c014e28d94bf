"""A mesh on paper: what each of its ranks will hold and how long a step will take, before anything is started.

Sizes come from the functions that the engine itself lays weights out with (`shards.py`, `kernels/weight.py`) and
pipelines are the lists that it executes (`schedule.py`), so a plan and the ranks it describes cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from engine.config import EngineConfig, ModelConfig, ParallelConfig
from engine.errors import ConfigError, nearest
from engine.parallel.mesh import AXES, Mesh
from engine.parallel.schedule import Costs, peak_activations, schedule
from engine.parallel.shards import Placement
from engine.planner import footprint, optimizer
from engine.planner.cost import StepTime, bubble, counted_micro_batches, missing_figures, model_flops, step_time
from engine.planner.machine import Machine
from engine.planner.share import DTYPES, Share
from engine.planner.traffic import Traffic, step_traffic


@dataclass(frozen=True)
class RankPlan:
    """Bytes of one rank by kind, and what a token costs in its KV pool."""

    stage: int
    layers: list[range]
    num_parameters: int
    num_bytes: dict[str, int]
    in_flight: int  # (micro-batch, chunk) pairs whose activations it keeps at the peak
    kv_token_bytes: int

    @property
    def total(self) -> int:
        return sum(self.num_bytes.values())

    def kv_tokens(self, memory_bytes: int, page_size: int) -> int:
        """Tokens whose keys and values fit beside everything else, in whole pages: floor((memory - total) /
        (page_size x bytes of a token)) x page_size, at least 0."""
        return max(0, (memory_bytes - self.total) // (page_size * self.kv_token_bytes)) * page_size


@dataclass(frozen=True)
class Plan:
    """What `make_plan` found. Times are None where the machine lacks a figure that they need (`missing`)."""

    model: ModelConfig
    config: EngineConfig
    machine: Machine
    micro_batches: int
    sequence_tokens: int
    stages: list[RankPlan]  # the heaviest rank of each
    bubble_fraction: float  # for a backward of twice a forward; `step.bubble_fraction` has the stages' own times
    traffic: list[list[Traffic]]  # of those ranks
    missing: list[str]
    step: StepTime | None

    @property
    def world_size(self) -> int:
        return world_size(self.config.parallel)

    @property
    def step_tokens(self) -> int:
        """Tokens of all replicas in one step."""
        return self.config.parallel.dp * self.micro_batches * self.config.train_batch_tokens

    @property
    def fits(self) -> bool | None:
        """Whether every rank has room for EngineConfig.kv_tokens; None for a machine without a size."""
        return None if self.kv_tokens is None else self.kv_tokens >= self.config.kv_tokens

    @property
    def kv_tokens(self) -> int | None:
        """The most tokens of a KV pool: what fits on the stage with the least room."""
        if not self.machine.memory_gb:
            return None
        return min(rank.kv_tokens(self.machine.memory_bytes, self.config.page_size) for rank in self.stages)

    @property
    def tokens_per_second(self) -> float | None:
        """Of all ranks together."""
        return None if self.step is None else self.step_tokens / self.step.total

    @property
    def model_flops_utilization(self) -> float | None:
        """FLOPs that the model needs over the peak of all ranks for as long as the step takes."""
        if self.tokens_per_second is None:
            return None
        peak = self.machine.peak_tflops * 1e12 * self.world_size
        return self.tokens_per_second * model_flops(self.model, self.sequence_tokens) / peak


def parse_mesh(text: str, **more: Any) -> ParallelConfig:
    """`tp=8,pp=3,dp=8` (any of dp, pp, cp, tp; 1 where left out) as a ParallelConfig with the keys `more`.

    Raises ConfigError for an unknown axis, with the nearest known one, and for what is no number of ranks.
    """
    sizes: dict[str, int] = {}
    for item in filter(None, (piece.strip() for piece in text.split(","))):
        axis, _, value = (piece.strip() for piece in item.partition("="))
        if axis not in AXES:
            raise ConfigError(
                f'the mesh "{text}" has an axis "{axis}"{nearest(axis, list(AXES))}; write it like tp=8,pp=3,dp=8, '
                f"with axes out of {', '.join(AXES)}"
            )
        if axis in sizes or not value.isdecimal() or int(value) < 1:
            raise ConfigError(
                f'the mesh "{text}" has {"a second " if axis in sizes else ""}"{item}"; each axis is given once, as a '
                "number of ranks from 1 on"
            )
        sizes[axis] = int(value)
    return ParallelConfig(**{**dict.fromkeys(AXES, 1), **sizes, **more})


def describe(parallel: ParallelConfig) -> str:
    """The axes with more than one rank, as `parse_mesh` reads them: dp=8,pp=3,tp=8."""
    sizes = {axis: getattr(parallel, axis) for axis in AXES}
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "dp=1"


def world_size(parallel: ParallelConfig) -> int:
    """Ranks of the mesh: dp x pp x cp x tp."""
    return parallel.dp * parallel.pp * parallel.cp * parallel.tp


def placement_of(parallel: ParallelConfig, rank: int) -> Placement:
    """Where a rank of the mesh stands; its groups have sizes and places, but nobody to talk to."""
    mesh = Mesh.layout(parallel, world_size(parallel), rank)
    return Placement(mesh, parallel.chunks_per_stage, parallel.sequence_parallel and parallel.tp > 1)


def plan_rank(share: Share, micro_batches: int) -> RankPlan:
    """Every kind of bytes on one rank. Raises ConfigError where the model cannot be dealt so."""
    held, mesh = footprint.held_weights(share), share.mesh
    in_flight = activations_in_flight(share.config.parallel, mesh.pp.index, micro_batches)
    return RankPlan(
        stage=mesh.pp.index,
        layers=share.chunks,
        num_parameters=sum(weight.num_elements for weight in held),
        num_bytes={
            "weights": footprint.weight_bytes(held, share.dtype),
            "gradients": footprint.gradient_bytes(share),
            "gradient sums": optimizer.gradient_sum_bytes(share),
            "optimizer": optimizer.optimizer_bytes(share),
            "activations": footprint.activation_bytes(share, in_flight),
            "backward": footprint.working_bytes(share),
            "logits": footprint.logits_bytes(share),
            "exchange": optimizer.exchange_bytes(share),
            "sampling": footprint.sampling_bytes(share),
            "rotary table": footprint.rotary_bytes(share.model),
        },
        in_flight=in_flight,
        kv_token_bytes=footprint.kv_token_bytes(share),
    )


def activations_in_flight(parallel: ParallelConfig, stage: int, micro_batches: int) -> int:
    """(micro-batch, chunk) pairs that a stage's rank keeps activations of at the schedule's peak, counted on the
    schedule's own list. Past a few micro-batches per stage only gpipe's peak grows, by one for each."""
    if parallel.schedule == "gpipe":
        return micro_batches
    return _peaks(parallel, counted_micro_batches(parallel.pp, micro_batches))[stage]


@lru_cache
def _peaks(parallel: ParallelConfig, micro_batches: int) -> list[int]:
    return peak_activations(schedule(parallel.schedule, parallel.pp, micro_batches, parallel.chunks_per_stage))


def plan_stages(
    model: ModelConfig, config: EngineConfig, micro_batches: int, sequence_tokens: int
) -> tuple[list[Share], list[RankPlan]]:
    """The heaviest rank of each stage: its share, and what it holds. Raises ConfigError."""
    if config.dtype not in DTYPES:
        raise ConfigError(f'plans are made for {" and ".join(DTYPES)}; EngineConfig.dtype is "{config.dtype}"')
    shares = [_heaviest(model, config, stage, sequence_tokens) for stage in range(config.parallel.pp)]
    return shares, [plan_rank(share, micro_batches) for share in shares]


def make_plan(
    model: ModelConfig, config: EngineConfig, machine: Machine, micro_batches: int = 0, sequence_tokens: int = 0
) -> Plan:
    """The plan of one training step: `micro_batches` for each replica (0: as many as ParallelConfig asks for at
    least) of `train_batch_tokens` each, in sequences of `sequence_tokens` (0: one to a micro-batch).

    Raises ConfigError for a mesh that the model does not divide over.
    """
    parallel = config.parallel
    if not parallel.dp:
        raise ConfigError("the plan needs a number of replicas, and ParallelConfig.dp is 0 (any); give dp")
    micro_batches = micro_batches or parallel.least_micro_batches
    sequence_tokens = sequence_tokens or config.train_batch_tokens
    if min(micro_batches, sequence_tokens) < 1:
        raise ConfigError(f"{micro_batches} micro-batches, sequences of {sequence_tokens} tokens: both must be above 0")
    shares, stages = plan_stages(model, config, micro_batches, sequence_tokens)
    missing = missing_figures(machine, shares[0].mesh)
    return Plan(
        model=model,
        config=config,
        machine=machine,
        micro_batches=micro_batches,
        sequence_tokens=sequence_tokens,
        stages=stages,
        bubble_fraction=bubble(parallel, Costs(), micro_batches),
        traffic=[step_traffic(share, micro_batches) for share in shares],
        missing=missing,
        step=None if missing else step_time(shares, machine, micro_batches),
    )


def _heaviest(model: ModelConfig, config: EngineConfig, stage: int, sequence_tokens: int) -> Share:
    """The rank of a stage that holds most: shards of rows differ by a panel, shares of the optimizer by a block. First
    the tensor-parallel place is chosen, then the one among the ranks that hold the same weights."""
    first = stage * config.parallel.cp * config.parallel.tp

    def share(rank: int) -> Share:
        return Share(model, config, placement_of(config.parallel, rank), sequence_tokens)

    def weights(rank: int) -> int:
        return footprint.weight_bytes(footprint.held_weights(share(rank)), DTYPES[config.dtype])

    heavy = share(max(range(first, first + config.parallel.tp), key=weights))
    elements = [each.elements for each in optimizer.owned_by_each(heavy)]
    return share(heavy.mesh.data.ranks[elements.index(max(elements))])
