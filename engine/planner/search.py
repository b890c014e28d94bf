"""Which mesh for a number of ranks: all of them are planned, those that fit are ranked by the time of a step."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from engine.config import EngineConfig, ModelConfig, ParallelConfig
from engine.errors import ConfigError
from engine.planner.machine import Machine
from engine.planner.plan import Plan, RankPlan, describe, make_plan, plan_stages, pool_tokens

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
    fitting: list[Plan] = []
    smallest: tuple[int, ParallelConfig, RankPlan] | None = None
    sequence_tokens = sequence_tokens or config.train_batch_tokens
    most_halves = sequence_tokens // LEAST_HALF
    for parallel in _meshes(config.parallel, num_ranks, machine.ranks_per_node):
        if 2 * parallel.cp > max(2, most_halves):
            continue
        micro_batches = step_tokens // (parallel.dp * config.train_batch_tokens)
        if micro_batches < parallel.pp:
            continue
        for checkpointing in (False, True):
            here = msgspec.structs.replace(config, parallel=parallel, activation_checkpointing=checkpointing)
            try:
                _, stages = plan_stages(model, here, micro_batches, sequence_tokens)
            except ConfigError:
                break  # the model does not divide over this mesh
            if pool_tokens(stages, machine, here) >= config.kv_tokens:
                fitting.append(make_plan(model, here, machine, micro_batches, sequence_tokens))
            needs = [rank.total + rank.kv_token_bytes * config.kv_tokens for rank in stages]
            if smallest is None or max(needs) < smallest[0]:
                smallest = max(needs), parallel, stages[needs.index(max(needs))]
    if smallest is None:
        raise ConfigError(
            f"no mesh of {num_ranks} ranks divides the model and {step_tokens} tokens a step into micro-batches of "
            f"{config.train_batch_tokens}; change the number of ranks, or give more tokens a step"
        )
    if not fitting:
        _, parallel, rank = smallest
        raise ConfigError(
            f"no mesh of {num_ranks} ranks fits {machine.memory_gb:g} GB; the nearest ({describe(parallel)}, with "
            f"activation checkpointing) needs {rank.total / 1e9:.1f} GB and "
            f"{rank.kv_token_bytes * config.kv_tokens / 1e9:.1f} GB for a KV pool of {config.kv_tokens} tokens: use "
            "more ranks, smaller micro-batches, or a smaller pool"
        )
    if missing := sorted({figure for plan in fitting for figure in plan.missing}):
        raise ConfigError(
            f'ranking meshes needs {", ".join(missing)}, which the machine "{machine.name}" does not have; give it'
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
