"""A plan to look at (tables) and to compute with (one JSON object)."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from engine.parallel.mesh import AXES
from engine.planner.machine import FIGURES, Machine
from engine.planner.plan import Plan, RankPlan, describe

SHOWN_STAGES = 6


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything `make_plan` found, in bytes and seconds; what is not known is null."""
    parallel, step = plan.config.parallel, plan.step
    return {
        "mesh": {axis: getattr(parallel, axis) for axis in AXES},
        "world_size": plan.world_size,
        "schedule": parallel.schedule,
        "activation_checkpointing": plan.config.activation_checkpointing,
        "micro_batches": plan.micro_batches,
        "step_tokens": plan.step_tokens,
        "stages": [
            {
                "layers": [[layers.start, layers.stop] for layers in rank.layers],
                "parameters": rank.num_parameters,
                "bytes": rank.num_bytes,
                "total_bytes": rank.total,
                "activations_in_flight": rank.in_flight,
                "kv_token_bytes": rank.kv_token_bytes,
                "traffic_bytes": {f"{item.axis}: {item.kind}": item.num_bytes for item in traffic},
            }
            for rank, traffic in zip(plan.stages, plan.traffic, strict=True)
        ],
        "kv_tokens": plan.kv_tokens,
        "fits": plan.fits,
        "bubble_fraction": plan.bubble_fraction,
        "step_seconds": None if step is None else step.total,
        "step_parts_seconds": None
        if step is None
        else {name: getattr(step, name) for name in ("compute", "exposed", "bubble", "gradients", "weights")},
        "tokens_per_second": plan.tokens_per_second,
        "model_flops_utilization": plan.model_flops_utilization,
        "machine": {name: getattr(plan.machine, name) for name in FIGURES},
        "machine_sources": {name: plan.machine.source(name) for name in FIGURES},
    }


def show(plan: Plan, console: Console) -> None:
    """Prints memory by kind, traffic by kind, the machine's figures, and the step's time."""
    config, parallel = plan.config, plan.config.parallel
    console.print(
        f"{plan.model.architecture}, {config.dtype}, {describe(parallel)} = {plan.world_size} ranks; "
        f"a step is {plan.micro_batches} micro-batches of {config.train_batch_tokens} tokens on each of {parallel.dp} "
        f"replicas, {plan.step_tokens} tokens in sequences of {plan.sequence_tokens}; schedule {parallel.schedule}, "
        f"activation checkpointing {'on' if config.activation_checkpointing else 'off'}",
        highlight=False,
    )
    console.print(memory_table(plan))
    console.print(traffic_table(plan))
    console.print(machine_table(plan.machine))
    for line in summary(plan):
        console.print(line, highlight=False)


def memory_table(plan: Plan) -> Table:
    """GB (1e9 bytes) by kind on the heaviest rank of each stage; of many stages the fullest few and the ends."""
    chosen = shown_stages(plan.stages)
    left_out = "" if len(chosen) == len(plan.stages) else f" ({len(chosen)} of {len(plan.stages)} stages)"
    table = Table(title=f"GB on the heaviest rank of each stage{left_out}", title_justify="left")
    table.add_column("")
    for rank in chosen:
        layers = ", ".join(f"{layers.start}-{layers.stop - 1}" for layers in rank.layers)
        table.add_column(f"stage {rank.stage}\nlayers {layers}", justify="right")
    for kind in plan.stages[0].num_bytes:
        table.add_row(kind, *(f"{rank.num_bytes[kind] / 1e9:.2f}" for rank in chosen))
    table.add_section()
    table.add_row("together", *(f"{rank.total / 1e9:.2f}" for rank in chosen))
    memory = plan.machine.memory_bytes
    if memory:
        table.add_row(f"left of {memory / 1e9:g}", *(f"{(memory - rank.total) / 1e9:.2f}" for rank in chosen))
    table.add_row("KV bytes a token", *(f"{rank.kv_token_bytes:,}" for rank in chosen))
    if memory:
        page = plan.config.page_size
        table.add_row("KV tokens that fit", *(f"{rank.kv_tokens(memory, page):,}" for rank in chosen))
    table.add_row("activations in flight", *(str(rank.in_flight) for rank in chosen))
    table.add_row("parameters", *(f"{rank.num_parameters:,}" for rank in chosen))
    return table


def shown_stages(stages: list[RankPlan]) -> list[RankPlan]:
    """All of a few stages; of many the first, the last, and the fullest between them, in order."""
    if len(stages) <= SHOWN_STAGES:
        return stages
    inner = sorted(stages[1:-1], key=lambda rank: -rank.total)[: SHOWN_STAGES - 2]
    return [stages[0], *sorted(inner, key=lambda rank: rank.stage), stages[-1]]


def traffic_table(plan: Plan) -> Table:
    """GB that a rank sends in a step, by kind: the stage that sends most of it."""
    table = Table("axis", "what", title="GB sent by one rank in a step", title_justify="left")
    table.add_column("GB", justify="right")
    most: dict[tuple[str, str], int] = {}
    for stage in plan.traffic:
        for item in stage:
            key = (item.axis, item.kind)
            most[key] = max(most.get(key, 0), item.num_bytes)
    for (axis, kind), num_bytes in most.items():
        table.add_row(axis, kind, f"{num_bytes / 1e9:.3f}")
    if not most:
        table.add_row("-", "nothing: one rank", "0")
    return table


def machine_table(machine: Machine) -> Table:
    """The figures that times and room follow from, and where each is from."""
    table = Table("figure", "value", "from", title=f"machine: {machine.name or 'given'}", title_justify="left")
    for name, (unit, meaning) in FIGURES.items():
        value = getattr(machine, name)
        table.add_row(meaning, f"{value:g} {unit}".strip() if value else "-", machine.source(name))
    return table


def summary(plan: Plan) -> list[str]:
    """What to take home, a line each."""
    lines = []
    if plan.config.parallel.pp > 1:
        lines.append(
            f"bubble: {plan.bubble_fraction:.1%} of the pipeline's time for a backward of twice a forward"
            + (f", {plan.step.bubble_fraction:.1%} with the stages' own times" if plan.step else "")
        )
    if plan.kv_tokens is not None:
        room = f"room for a KV pool of {plan.kv_tokens:,} tokens on each replica"
        wanted = f"{plan.config.kv_tokens:,} (kv_tokens)"
        lines.append(f"fits: {room}" if plan.fits else f"does not fit: {room}, less than {wanted}")
    if plan.step is None:
        lines.append(f"no time: the machine lacks {', '.join(plan.missing)}")
        return lines
    step = plan.step
    lines.append(
        f"a step: {step.total:.3g} s estimated = {step.compute:.3g} compute + {step.exposed:.3g} tensor and context "
        f"traffic + {step.bubble:.3g} bubble + {step.gradients:.3g} gradients + {step.weights:.3g} updated weights"
    )
    lines.append(
        f"{plan.tokens_per_second:,.0f} tokens/s, {plan.model_flops_utilization:.1%} of all ranks' peak in the model's "
        "own FLOPs"
    )
    return lines


def show_search(plans: list[Plan], console: Console, limit: int) -> None:
    """The best meshes, one to a row."""
    table = Table(title=f"fastest of {len(plans)} that fit", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("mesh", no_wrap=True)
    table.add_column("checkpoints")
    for name in ("tokens/s", "step s", "bubble", "of peak", "GB", "KV tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for plan in plans[:limit]:
        assert plan.step is not None, "search ranks by time"
        table.add_row(
            describe(plan.config.parallel),
            "yes" if plan.config.activation_checkpointing else "no",
            f"{plan.tokens_per_second:,.0f}",
            f"{plan.step.total:.3g}",
            f"{plan.step.bubble_fraction:.1%}",
            f"{plan.model_flops_utilization:.1%}",
            f"{max(rank.total for rank in plan.stages) / 1e9:.1f}",
            f"{plan.kv_tokens:,}",
        )
    console.print(table)
    console.print(machine_table(plans[0].machine))
