"""A mesh on paper: what each of its ranks will hold and how long a step will take, before anything is started.

Sizes come from the functions that the engine itself lays weights out with (`shards.py`, `kernels/weight.py`) and
pipelines are the lists that it executes (`schedule.py`), so a plan and the ranks it describes cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from engine.config import EngineConfig, ModelConfig, ParallelConfig
from engine.errors import ConfigError, nearest
from engine.parallel import footprint
from engine.parallel.cost import StepTime, missing_figures, model_flops, step_time
from engine.parallel.footprint import DTYPES
from engine.parallel.machine import Machine
from engine.parallel.mesh import AXES, Mesh
from engine.parallel.schedule import bubble_fraction, peak_activations, schedule
from engine.parallel.shards import Placement
from engine.parallel.traffic import Traffic, step_traffic

IN_FLIGHT_LIMIT = 4  # micro-batches per stage after which a schedule's peak does not grow (but gpipe's)


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
        memory = self.machine.memory_bytes
        if not memory:
            return None
        return min(rank.kv_tokens(memory, self.config.page_size) for rank in self.stages)

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


def parse_mesh(text: str, **more: object) -> ParallelConfig:
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
    return msgspec.convert(dict.fromkeys(AXES, 1) | sizes | more, ParallelConfig)


def world_size(parallel: ParallelConfig) -> int:
    """Ranks of the mesh: dp x pp x cp x tp."""
    return parallel.dp * parallel.pp * parallel.cp * parallel.tp


def placement_of(parallel: ParallelConfig, rank: int) -> Placement:
    """Where a rank of the mesh stands; its groups have sizes and places, but nobody to talk to."""
    mesh = Mesh.layout(parallel, world_size(parallel), rank)
    return Placement(mesh, parallel.chunks_per_stage, parallel.sequence_parallel and parallel.tp > 1)


def plan_rank(model: ModelConfig, config: EngineConfig, placement: Placement, micro_batches: int) -> RankPlan:
    """Every kind of bytes on the rank at `placement`. Raises ConfigError where the model cannot be placed so."""
    held, dtype, mesh = footprint.held_weights(model, placement), DTYPES[config.dtype], placement.mesh
    layers = footprint.chunks(model, placement)
    in_flight = activations_in_flight(config.parallel, mesh.pp.index, micro_batches)
    where = (model, config, placement)
    return RankPlan(
        stage=mesh.pp.index,
        layers=layers,
        num_parameters=sum(weight.num_elements for weight in held),
        num_bytes={
            "weights": footprint.weight_bytes(held, dtype),
            "gradients": footprint.gradient_bytes(held),
            "gradient sums": footprint.gradient_sum_bytes(held, mesh),
            "optimizer": footprint.optimizer_bytes(held, mesh),
            "activations": footprint.activation_bytes(*where, in_flight),
            "backward": footprint.working_bytes(*where),
            "logits": footprint.logits_bytes(*where),
            "sampling": footprint.sampling_bytes(*where),
            "rotary table": footprint.rotary_bytes(model),
        },
        in_flight=in_flight,
        kv_token_bytes=footprint.kv_token_bytes(*where),
    )


def activations_in_flight(parallel: ParallelConfig, stage: int, micro_batches: int) -> int:
    """(micro-batch, chunk) pairs that a stage's rank keeps activations of at the schedule's peak. Counted on the
    schedule's own list; past a few micro-batches per stage only gpipe's peak grows, by one for each."""
    if parallel.schedule == "gpipe":
        return micro_batches
    counted = min(micro_batches, IN_FLIGHT_LIMIT * parallel.pp)
    return peak_activations(schedule(parallel.schedule, parallel.pp, counted, parallel.chunks_per_stage))[stage]


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
        raise ConfigError(f"{micro_batches} micro-batches and sequences of {sequence_tokens} tokens: both must be above 0")
    heaviest = [_heaviest(model, config, stage, micro_batches) for stage in range(parallel.pp)]
    placements = [placement for placement, _ in heaviest]
    missing = missing_figures(machine, placements[0].mesh)
    counted = schedule(parallel.schedule, parallel.pp, micro_batches, parallel.chunks_per_stage)
    return Plan(
        model=model,
        config=config,
        machine=machine,
        micro_batches=micro_batches,
        sequence_tokens=sequence_tokens,
        stages=[rank for _, rank in heaviest],
        bubble_fraction=bubble_fraction(counted),
        traffic=[step_traffic(model, config, placement, micro_batches) for placement in placements],
        missing=missing,
        step=None if missing else step_time(model, config, placements, machine, sequence_tokens, micro_batches),
    )


def _heaviest(model: ModelConfig, config: EngineConfig, stage: int, micro_batches: int) -> tuple[Placement, RankPlan]:
    """The rank of a stage that has most to hold: shards and shares of rows differ by a panel between ranks. First the
    tensor-parallel place is chosen, then the one among the ranks that hold the same weights."""
    parallel = config.parallel

    def at(rank: int) -> tuple[Placement, RankPlan]:
        placement = placement_of(parallel, rank)
        return placement, plan_rank(model, config, placement, micro_batches)

    first = stage * parallel.cp * parallel.tp
    placement, _ = max((at(first + index) for index in range(parallel.tp)), key=lambda found: found[1].total)
    return max((at(rank) for rank in placement.mesh.data.ranks), key=lambda found: found[1].total)


def search(
    model: ModelConfig,
    config: EngineConfig,
    machine: Machine,
    num_ranks: int,
    step_tokens: int,
    sequence_tokens: int = 0,
) -> list[Plan]:
    """Meshes of `num_ranks` that fit the machine's memory, with and without activation checkpointing, the fastest step
    of about `step_tokens` first.

    Tried are all divisions of the ranks into dp, pp, cp and tp with a tp no larger than a node; those where heads,
    layers or panels do not divide, or where there are fewer micro-batches than stages, are passed over. Raises
    ConfigError where the machine lacks a figure that ranking needs, and where nothing fits, with what came nearest.
    """
    if not machine.memory_gb:
        raise ConfigError(f'searching needs the memory of a rank, and the machine "{machine.name}" has none; give it')
    found: list[Plan] = []
    for parallel in _meshes(config.parallel, num_ranks, machine.ranks_per_node):
        micro_batches = step_tokens // (parallel.dp * config.train_batch_tokens)
        if micro_batches < parallel.pp:
            continue
        for checkpointing in (False, True):
            here = msgspec.structs.replace(config, parallel=parallel, activation_checkpointing=checkpointing)
            try:
                found.append(make_plan(model, here, machine, micro_batches, sequence_tokens))
            except ConfigError:
                break  # this mesh does not divide the model
    if not found:
        raise ConfigError(
            f"no mesh of {num_ranks} ranks divides the model and {step_tokens} tokens a step into micro-batches of "
            f"{config.train_batch_tokens}; change the number of ranks, or give more tokens a step"
        )
    if missing := sorted({figure for plan in found for figure in plan.missing}):
        raise ConfigError(
            f'ranking meshes needs {", ".join(missing)}, which the machine "{machine.name}" does not have; give it'
        )
    fitting = [plan for plan in found if plan.fits]
    if not fitting:
        best = min(found, key=lambda plan: max(rank.total for rank in plan.stages))
        most = max(best.stages, key=lambda rank: rank.total)
        raise ConfigError(
            f"no mesh of {num_ranks} ranks fits {machine.memory_gb:g} GB with a KV pool of {config.kv_tokens} tokens; the "
            f"smallest ({Mesh.layout(best.config.parallel, num_ranks, 0)}) needs {most.total / 1e9:.1f} GB and "
            f"{most.kv_token_bytes * config.kv_tokens / 1e9:.1f} GB for the pool: use more ranks, smaller micro-batches, "
            "or a smaller pool"
        )
    return sorted(fitting, key=lambda plan: -(plan.tokens_per_second or 0.0))


def _meshes(parallel: ParallelConfig, num_ranks: int, ranks_per_node: int) -> Iterator[ParallelConfig]:
    for tp in _divisors(num_ranks):
        for cp in _divisors(num_ranks // tp):
            for pp in _divisors(num_ranks // tp // cp):
                if tp <= ranks_per_node:
                    yield msgspec.structs.replace(parallel, dp=num_ranks // tp // cp // pp, pp=pp, cp=cp, tp=tp)


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
