"""The options that every benchmark takes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import gpu, machine, transformers_peer
from benchmarks.workloads import MODELS


def parse(
    description: str, argv: Sequence[str] | None, workloads: str = "", backends: bool = False
) -> argparse.Namespace:
    """`args.scale` is what lengths are multiplied by and `args.config` the model's shape; `args.peer` says whether
    transformers is measured beside us."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--model", default="llama-110m", choices=list(MODELS))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where the engine and torch run")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each figure; the median is shown")
    if workloads:
        parser.add_argument("--workloads", default=workloads, help=f"comma-separated (default {workloads})")
    if backends:
        parser.add_argument("--backends", help="comma-separated: attention's, measured side by side (default: every "
                            "one that can run on a GPU, or the one that serves on a CPU)")  # fmt: skip
    parser.add_argument("--peer", default="transformers", choices=["transformers", "none"],
                        help="what to measure in the same run, beside us")  # fmt: skip
    parser.add_argument("--peer-results", type=Path, help="JSON lines of other engines, measured on this machine")
    parser.add_argument("--quick", action="store_true",
                        help="everything 16 times smaller, to see that it runs: the figures mean nothing")  # fmt: skip
    args = parser.parse_args(argv)
    need_device(parser, args.device)
    args.scale = 1 / 16 if args.quick else 1.0
    args.repeats = 1 if args.quick else args.repeats
    args.config = MODELS[args.model]
    if args.peer == "transformers" and not transformers_peer.available():
        args.peer = "none"
    return args


def need_device(parser: argparse.ArgumentParser, device: str) -> None:
    """Ends the program where it is told to run on a GPU and torch sees none."""
    if device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA device here")


def limits(args: argparse.Namespace) -> machine.Machine:
    """What the device at hand can do at best, measured now."""
    return gpu.measure(args.quick) if args.device == "cuda" else machine.measure(args.quick)
