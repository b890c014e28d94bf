"""python -m engine: generate, chat, score, plan and ops from the command line."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from engine.chat import ChatTemplate, parse_response
from engine.config import DEVICES, EngineConfig
from engine.engine import Engine
from engine.errors import EngineError
from engine.kernels.dtypes import MODEL_DTYPES
from engine.kernels.table import rows as op_rows
from engine.parallel.launch import is_main_rank
from engine.planner import command as planner
from engine.tokenizer import Tokenizer
from engine.types import SamplingParams

console = Console()


def load(args: argparse.Namespace) -> Engine:
    config = EngineConfig(device=args.device, dtype=args.dtype, kv_tokens=args.kv_tokens)
    return Engine.from_pretrained(args.model, config)


def sampling(args: argparse.Namespace) -> SamplingParams:
    return SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed)


def tokenizer_of(engine: Engine, path: str) -> Tokenizer:
    if engine.tokenizer is None:
        raise EngineError(f"{path} has no tokenizer.json; text cannot be turned into tokens without one")
    return engine.tokenizer


def generate(args: argparse.Namespace) -> None:
    """Completes one prompt, printing text as it comes."""
    engine = load(args)
    tokenizer_of(engine, args.model)
    for event in engine.stream([args.prompt], sampling(args)):
        console.print(event.text, end="", markup=False, highlight=False, soft_wrap=True)
    console.print()


def asked() -> str:
    """A line that was typed; nothing at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return ""


def chat(args: argparse.Namespace) -> None:
    """A conversation; an empty line or end of input ends it."""
    engine = load(args)
    template = ChatTemplate.from_pretrained(args.model)
    tokenizer = tokenizer_of(engine, args.model)
    messages: list[dict[str, Any]] = []
    console.print(f"[dim]{args.model}, thinking {'on' if args.think else 'off'}; an empty line ends the chat[/dim]")
    while True:
        text = engine.ranks.once(asked)
        if not text.strip():
            return
        messages.append({"role": "user", "content": text})
        prompt = template.render(messages, add_generation_prompt=True, thinking=args.think)
        reply = ""
        for event in engine.stream([tokenizer.encode(prompt, add_special_tokens=False)], sampling(args)):
            reply += event.text
            console.print(event.text, end="", markup=False, highlight=False, soft_wrap=True)
        console.print()
        messages.append({"role": "assistant", "content": parse_response(reply).answer})


def score(args: argparse.Namespace) -> None:
    """Prints each token of a text with its log-probability."""
    engine = load(args)
    tokenizer = tokenizer_of(engine, args.model)
    ids = tokenizer.encode(args.text)
    table = Table("token", "text", "log p")
    for token, value in zip(ids[1:], engine.score([ids])[0].tolist(), strict=True):
        table.add_row(str(token), repr(tokenizer.decode([token], skip_special_tokens=False)), f"{value:.6f}")
    console.print(table)


def plan(args: argparse.Namespace) -> None:
    """What a mesh of ranks will hold, send and take, for any model's config.json: nothing is started or loaded."""
    planner.run(args, console)


def ops(args: argparse.Namespace) -> None:
    """Which backend runs each op here, and why not the others."""
    table = Table("op", "backend", "chosen", "exact", "proven", "why not")
    for row in op_rows(MODEL_DTYPES[args.dtype], args.device):
        exact, proven = ("yes" if each else "no" for each in (row.exact, row.proven))
        table.add_row(row.op, row.backend, "yes" if row.chosen else "", exact, proven, row.why_not)
    console.print(table)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m engine", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="command")

    def command(function: Any, name: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        sub.set_defaults(run=function)
        return sub

    def with_model(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
        sub.add_argument("model", help="a Hugging Face directory")
        sub.add_argument("--dtype", default="bfloat16", help=f"one of {', '.join(MODEL_DTYPES)} (default bfloat16)")
        sub.add_argument("--device", default="auto", choices=DEVICES, help="where the model lies (default auto)")
        sub.add_argument("--kv-tokens", type=int, default=65536, help="size of the KV pool (default 65536)")
        return sub

    def with_sampling(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
        sub.add_argument("--max-tokens", type=int, default=512)
        sub.add_argument("--temperature", type=float, default=0.6)
        sub.add_argument("--top-p", type=float, default=0.95)
        sub.add_argument("--seed", type=int, default=None)
        return sub

    sub = with_sampling(with_model(command(generate, "generate")))
    sub.add_argument("prompt")
    sub = with_sampling(with_model(command(chat, "chat")))
    sub.add_argument(
        "--think", action=argparse.BooleanOptionalAction, default=False, help="let the model think before it answers"
    )
    sub = with_model(command(score, "score"))
    sub.add_argument("text")
    planner.add_arguments(command(plan, "plan"))
    sub = command(ops, "ops")
    sub.add_argument("--dtype", default="bfloat16", choices=MODEL_DTYPES, help="of the model")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    sub.add_argument("--device", default=default, choices=["cpu", "cuda"], help="where the model lies")
    return top


def main(arguments: list[str] | None = None) -> int:
    console.quiet = not is_main_rank()
    args = parser().parse_args(arguments)
    try:
        args.run(args)
    except EngineError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
