"""python -m rl: train | sft | evaluate | demo"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from engine import (
    ChatTemplate,
    ConfigError,
    Engine,
    EngineError,
    InputError,
    is_main_rank,
    load_config,
    report_failure,
)
from rl.config import SFTConfig, TrainConfig
from rl.demo import DEMO_DIRECTORY, demo
from rl.env import make_environment
from rl.evaluate import evaluate
from rl.loop import train
from rl.rollout import Collector
from rl.run import Run
from rl.sft import sft

console = Console()
INTERRUPTED = 130


def run_train(args: argparse.Namespace) -> int:
    """Reinforcement learning by a TOML file."""
    config = load_config(TrainConfig, args.config, args.overrides)
    with Run(config, args.resume) as run:
        train(run)
        if run.step < config.steps:
            return stopped(run.step, "train", args)
        run.write_report()
    say(f"{run.directory}/checkpoint is written; {run.directory}/report.html shows how it came to be")
    return 0


def run_sft(args: argparse.Namespace) -> int:
    """Supervised fine-tuning by a TOML file."""
    config = load_config(SFTConfig, args.config, args.overrides)
    if not sft(config, args.resume):
        return stopped(None, "sft", args)
    say(f"{config.run_dir}/checkpoint is written")
    return 0


def run_evaluate(args: argparse.Namespace) -> int:
    """Pass@1 of `model` on held-out problems, thinking and not."""
    config = load_config(TrainConfig, args.config, args.overrides)
    env = make_environment(config.env.name, config.env.arguments)
    engine = Engine.from_pretrained(config.model, config.engine)
    collector = Collector(engine, env, ChatTemplate.from_pretrained(config.model), config.max_prompt_tokens)
    table = Table("mode", "accuracy", "± standard error", "mean tokens", "problems", "samples of each")
    for thinking in (True, False):
        result = evaluate(collector, config.evaluation, thinking)
        table.add_row("thinking" if thinking else "direct", f"{result.accuracy:.1%}", f"{result.standard_error:.1%}",
                      f"{result.mean_tokens:.1f}", str(result.problems), str(result.samples))  # fmt: skip
    collector.close()
    engine.close()
    console.print(table)
    return 0


def run_demo(args: argparse.Namespace) -> int:
    """From nothing to a model that thinks: data, supervised fine-tuning, reinforcement learning, report."""
    if demo(args.dir, args.resume, args.overrides, console):
        return 0
    again = " ".join(["python -m rl demo --dir", args.dir, *args.overrides, "--resume"])
    say(f"saved after the step that ran; continue with: {again}")
    return INTERRUPTED


def stopped(step: int | None, command: str, args: argparse.Namespace) -> int:
    """Says how to go on."""
    where = "" if step is None else f" at step {step}"
    again = " ".join(["python -m rl", command, args.config, *args.overrides, "--resume"])
    say(f"saved{where}; continue with: {again}")
    return INTERRUPTED


def say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m rl", description="Post-training on the engine.")
    commands = top.add_subparsers(required=True, metavar="command")

    def command(function: Callable[[argparse.Namespace], int], name: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=function.__doc__, description=function.__doc__, allow_abbrev=False)
        sub.set_defaults(function=function)
        return sub

    for function, name in ((run_train, "train"), (run_sft, "sft"), (run_evaluate, "evaluate")):
        sub = command(function, name)
        sub.add_argument("config", help="a TOML file, such as those of examples/")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a key of the file")
        if name != "evaluate":
            sub.add_argument("--resume", action="store_true", help="go on from the saved state of the run")
    sub = command(run_demo, "demo")
    sub.add_argument(
        "overrides", nargs="*", metavar="stage.key=value", help="replaces a key of the corpus, sft or train stage"
    )
    sub.add_argument("--dir", default=DEMO_DIRECTORY, help=f"where the run goes (default {DEMO_DIRECTORY})")
    sub.add_argument("--resume", action="store_true", help="go on where an interrupted demo stopped")
    return top


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 done, 1 an error in one line, 130 interrupted and saved. Of several ranks the main one speaks;
    an error that not all of them have, each that has it."""
    console.quiet = not is_main_rank()
    args = parser().parse_args(arguments)
    try:
        return int(args.function(args))
    except EngineError as error:
        report_failure(error)
        shared = isinstance(error, ConfigError | InputError)
        errors = Console(stderr=True, quiet=shared and not is_main_rank())
        errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        say("stopped at once; the last saved state is kept, --resume goes on from it")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
