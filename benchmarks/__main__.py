"""Every benchmark on the models given, one after the other, into benchmarks/results/<machine>.md.

    python -m benchmarks --models llama-15m,llama-110m --peer-results results.jsonl

Takes minutes a model; the machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import cli, decode, exactness_cost, grpo_step, kernels, rollout, scaling, train_step
from benchmarks.machine import processor, slug

RESULTS = Path(__file__).parent / "results"
BENCHMARKS = {
    "decode": decode,
    "rollout": rollout,
    "train_step": train_step,
    "grpo_step": grpo_step,
    "exactness_cost": exactness_cost,
    "kernels": kernels,
    "scaling": scaling,
}
# Half a billion parameters take minutes a workload on a laptop: the small variants, and no whole GRPO step.
LARGE = {"qwen3-0.6b": {"rollout": ["--workloads=W2s"], "train_step": ["--workloads=T1s"], "grpo_step": None}}


def run(name: str, arguments: list[str]) -> tuple[str, bool]:
    """What the benchmark prints, less its last line (JSON, for programs), and whether some of it failed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        summary = BENCHMARKS[name].main(arguments)
    return out.getvalue().strip().rsplit("\n", 1)[0].strip(), bool(summary.get("failed"))


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs them all; returns the file written. Options that are not its own go to every benchmark. Ends the program in
    status 1 where something failed; the file is written all the same."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="llama-110m", help="comma-separated")
    parser.add_argument("--only", default=",".join(BENCHMARKS), help="comma-separated names (default: all)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where they run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder to write to")
    args, forwarded = parser.parse_known_args(argv)
    cli.need_device(parser, args.device)
    name = torch.cuda.get_device_name() if args.device == "cuda" else processor()
    failed: list[str] = []
    text = [f"# {name}, {time.strftime('%Y-%m-%d')}\n"]
    for model in args.models.split(","):
        for benchmark in args.only.split(","):
            extra = LARGE.get(model, {}).get(benchmark, [])
            if extra is None:
                continue
            options = [*forwarded, f"--model={model}", *([] if args.device == "cpu" else ["--device=cuda"]), *extra]
            said, in_part = run(benchmark, options)
            failed += [f"{benchmark} ({model})"] if in_part else []
            text.append(f"## {benchmark}, {model}\n\n{said}\n")
            print(text[-1], flush=True)
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"{slug(name)}.md"
    path.write_text("\n".join(text))
    print(f"written to {path}")
    if failed:
        sys.exit(f"failed in part: {', '.join(failed)}; see {path}")
    return path


if __name__ == "__main__":
    main()
