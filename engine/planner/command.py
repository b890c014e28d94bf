"""`python -m engine plan MODEL MESH`: arguments in, tables or one line of JSON out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import msgspec
from rich.console import Console

from engine.architectures import model_config_from_hf
from engine.checkpoint import read_config
from engine.config import SCHEDULES, EngineConfig, ModelConfig
from engine.errors import CheckpointError, ConfigError
from engine.planner.machine import FIGURES, MACHINES, Machine, load_machine, parse_bytes
from engine.planner.plan import make_plan, parse_mesh
from engine.planner.report import as_json, show, show_search
from engine.planner.search import search

_REMEDY = "give a Hugging Face directory or its config.json"
STEP_TOKENS = 1 << 22  # what a search shares out unless told: a step of 4 Mi tokens


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """The options of the command; what is not given has the engine's own default."""
    sub.add_argument("model", help="a Hugging Face directory or its config.json; weights are not read")
    sub.add_argument("mesh", nargs="?", default="", help="ranks along dp, pp, cp and tp, like tp=8,pp=3,dp=8")
    sub.add_argument("--search", type=int, metavar="RANKS", help="propose meshes of that many ranks")
    sub.add_argument("--top", type=int, default=8, help="how many of them (default 8)")
    sub.add_argument("--json", action="store_true", help="print one JSON object, or one a line with --search")
    engine = sub.add_argument_group("the engine")
    engine.add_argument("--dtype", default="bfloat16", help="bfloat16 (default) or float32")
    engine.add_argument("--micro-batch-tokens", type=int, metavar="T", help="train_batch_tokens (default 8192)")
    engine.add_argument("--micro-batches", type=int, default=0, metavar="M", help="of each replica in a step")
    engine.add_argument(
        "--step-tokens", type=int, default=0, metavar="N", help="tokens of all replicas in a step, in place of M"
    )
    engine.add_argument("--sequence-tokens", type=int, default=0, metavar="S", help="length of a sample (default T)")
    engine.add_argument("--activation-checkpointing", action="store_true", help="compute layers again in the backward")
    engine.add_argument("--schedule", default="1f1b", help=", ".join(SCHEDULES))
    engine.add_argument("--virtual-stages", type=int, default=0, help="chunks of layers on a rank (interleaved)")
    engine.add_argument("--sequence-parallel", action=argparse.BooleanOptionalAction, default=True)
    engine.add_argument("--kv-tokens", type=int, help="the KV pool that has to fit (default 65536)")
    machine = sub.add_argument_group("the machine")
    machine.add_argument("--machine", default="h200", help=f"{', '.join(MACHINES)} or FILE.toml (default h200)")
    machine.add_argument("--memory", metavar="BYTES", help="of a rank, like 180GB or 64GiB")
    for name, (unit, meaning) in FIGURES.items():
        if name != "memory_gb":
            kind = int if name == "ranks_per_node" else float
            sub_help = f"{meaning} ({unit})" if unit else meaning
            machine.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="X", help=sub_help)


def run(args: argparse.Namespace, console: Console) -> None:
    """Plans, or searches, and prints. Raises ConfigError, CheckpointError."""
    model, machine, config = read_model(args.model), _machine(args), _config(args)
    if args.search is not None:
        if args.mesh or args.micro_batches:
            given = "a mesh" if args.mesh else "--micro-batches"
            raise ConfigError(f"--search divides {args.search} ranks by itself; leave out {given}")
        if args.search < 1 or args.top < 1:
            raise ConfigError(f"--search {args.search} --top {args.top}: both must be at least 1")
        plans = search(model, config, machine, args.search, args.step_tokens or STEP_TOKENS, args.sequence_tokens)
        if args.json:
            for plan in plans[: args.top]:
                print(json.dumps(as_json(plan)))
        else:
            show_search(plans, console, args.top)
        return
    plan = make_plan(model, config, machine, _micro_batches(args, config), args.sequence_tokens)
    if args.json:
        print(json.dumps(as_json(plan)))
    else:
        show(plan, console)


def read_model(path: str) -> ModelConfig:
    """The ModelConfig of a Hugging Face directory, or of a file in the format of its `config.json`.

    Raises CheckpointError, ConfigError.
    """
    if not Path(path).is_file():
        return read_config(path)
    try:
        data = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); {_REMEDY}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds no JSON object; {_REMEDY}")
    return model_config_from_hf(data)


def _machine(args: argparse.Namespace) -> Machine:
    given = {name: getattr(args, name) for name in FIGURES if name != "memory_gb"}
    memory = None if args.memory is None else parse_bytes(args.memory) / 1e9
    return load_machine(args.machine, memory_gb=memory, **given)


def _config(args: argparse.Namespace) -> EngineConfig:
    parallel = parse_mesh(
        args.mesh,
        schedule=args.schedule,
        virtual_stages=args.virtual_stages,
        sequence_parallel=args.sequence_parallel,
    )
    config = EngineConfig(
        device="cpu" if args.machine == "cpu" else "cuda", dtype=args.dtype, parallel=parallel,
        activation_checkpointing=args.activation_checkpointing,
    )  # fmt: skip
    given = {"train_batch_tokens": args.micro_batch_tokens, "kv_tokens": args.kv_tokens}
    return msgspec.structs.replace(config, **{key: value for key, value in given.items() if value is not None})


def _micro_batches(args: argparse.Namespace, config: EngineConfig) -> int:
    if not args.step_tokens:
        return args.micro_batches
    if args.micro_batches:
        raise ConfigError("--micro-batches and --step-tokens say the same thing; give one")
    each = config.parallel.dp * config.train_batch_tokens
    if args.step_tokens < each:
        raise ConfigError(
            f"a step of {args.step_tokens} tokens is less than one micro-batch of {config.train_batch_tokens} on each "
            f"of {config.parallel.dp} replicas ({each}); give at least that"
        )
    return args.step_tokens // each
