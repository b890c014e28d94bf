"""Which mesh for a number of ranks: all of them are planned, those that fit are ranked by the time of a step."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from engine.config import EngineConfig, ModelConfig, ParallelConfig
from engine.errors import ConfigError
from engine.planner.footprint import FP32, activation_bytes, gradient_bytes, held_weights, weight_bytes
from engine.planner.machine import Machine
from engine.planner.plan import Plan, activations_in_flight, describe, make_plan, placement_of
from engine.planner.share import Share

LEAST_HALF = 16  # tokens of a sequence in each of the two pieces that a context-parallel rank gets, at least


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
    layers or panels do not divide, with fewer micro-batches than stages, or with sequences too short for cp, are passed
    over. Raises ConfigError where the machine lacks a figure that ranking needs, and where nothing fits, with what came
    nearest.
    """
    if not machine.memory_gb:
        raise ConfigError(f'searching needs the memory of a rank, and the machine "{machine.name}" has none; give it')
    sequence_tokens = sequence_tokens or config.train_batch_tokens
    candidates: list[tuple[int, EngineConfig, int]] = []
    for parallel in _meshes(config.parallel, num_ranks, machine.ranks_per_node):
        micro_batches = step_tokens // (parallel.dp * config.train_batch_tokens)
        too_short = parallel.cp > 1 and sequence_tokens < 2 * LEAST_HALF * parallel.cp
        if micro_batches < parallel.pp or too_short:
            continue
        for checkpointing in (False, True):
            here = msgspec.structs.replace(config, parallel=parallel, activation_checkpointing=checkpointing)
            try:
                least = least_bytes(model, here, micro_batches, sequence_tokens)
            except ConfigError:
                break  # the model does not divide over this mesh
            candidates.append((least, here, micro_batches))
    if not candidates:
        raise ConfigError(
            f"no mesh of {num_ranks} ranks divides the model and {step_tokens} tokens a step into micro-batches of "
            f"{config.train_batch_tokens}; change the number of ranks, or give more tokens a step"
        )
    plans = (
        make_plan(model, here, machine, micro_batches, sequence_tokens)
        for least, here, micro_batches in candidates
        if least <= machine.memory_bytes
    )
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        _, here, micro_batches = min(candidates, key=lambda candidate: candidate[0])
        nearest = make_plan(model, here, machine, micro_batches, sequence_tokens)
        rank = max(nearest.stages, key=lambda rank: rank.total)
        raise ConfigError(
            f"no mesh of {num_ranks} ranks fits {machine.memory_gb:g} GB; the nearest ({describe(here.parallel)}, with "
            f"activation checkpointing) needs {rank.total / 1e9:.1f} GB and "
            f"{rank.kv_token_bytes * config.kv_tokens / 1e9:.1f} GB for a KV pool of {config.kv_tokens} tokens: use "
            "more ranks, smaller micro-batches, or a smaller pool"
        )
    if missing := sorted({figure for plan in fitting for figure in plan.missing}):
        raise ConfigError(
            f'ranking meshes needs {", ".join(missing)}, which the machine "{machine.name}" does not have; give it'
        )
    return sorted(fitting, key=lambda plan: -(plan.tokens_per_second or 0.0))


def least_bytes(model: ModelConfig, config: EngineConfig, micro_batches: int, sequence_tokens: int) -> int:
    """What no rank of the first stage does without: weights, gradients, an even share of the optimizer, activations.

    Cheap to compute, so that most meshes of a large model are out before anything is dealt. Raises ConfigError.
    """
    share = Share(model, config, placement_of(config.parallel, 0), sequence_tokens)
    held = held_weights(share)
    sharded = 3 * FP32 * sum(weight.num_elements for weight in held) // share.mesh.data.size
    in_flight = activations_in_flight(config.parallel, 0, micro_batches)
    return weight_bytes(held, share.dtype) + gradient_bytes(share) + sharded + activation_bytes(share, in_flight)


def _meshes(parallel: ParallelConfig, num_ranks: int, ranks_per_node: int) -> Iterator[ParallelConfig]:
    for tp in _divisors(num_ranks):
        for cp in _divisors(num_ranks // tp):
            for pp in _divisors(num_ranks // tp // cp):
                if tp <= ranks_per_node:
                    yield msgspec.structs.replace(parallel, dp=num_ranks // tp // cp // pp, pp=pp, cp=cp, tp=tp)


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
