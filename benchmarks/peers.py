"""This engine's figures as lines of JSON, one a timed run, in the form that other engines' drivers print theirs: for
running it among them in turn.

    python -m benchmarks.peers --model llama-110m --workloads W1,W2,W3,W4 [--checkpoint DIRECTORY]

W1 gives decode_tok_s, the other generation workloads out_tok_s, training useful_tok_s, R1 step_s. `startup_s` is from
the start of the process to an engine with its weights, so it holds the import of torch.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode import decode_speed
from benchmarks.project import Project
from benchmarks.timing import seconds
from benchmarks.workloads import MODELS, generation, training_sequences

GENERATION = ("W1", "W2", "W2s", "W3", "W4", "R1")


def process_age() -> float:
    """Seconds since this process was started (proc(5), starttime: clock ticks after boot)."""
    started = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


def generation_lines(project: Project, name: str, scale: float, repeats: int) -> Iterator[dict[str, Any]]:
    """W1 to W4."""
    work = generation(name, project.engine.model.config, scale)
    if name == "W1":
        [(speeds, first)] = decode_speed([project], work, repeats)
        for speed, first_s in zip(speeds, first, strict=True):
            total = first_s + (work.max_new[0] - 1) / speed
            yield {"metric": "decode_tok_s", "value": round(speed, 2), "seconds": round(total, 3),
                   "ttft_s": round(first_s, 4), "e2e_tok_s": round(work.output_tokens / total, 2)}  # fmt: skip
        return
    project.generate(work.head(2, 8))
    for _ in range(repeats):
        taken = seconds(lambda: project.generate(work))
        yield {"metric": "out_tok_s", "value": round(work.output_tokens / taken, 2), "seconds": round(taken, 3),
               "logprobs": True}  # fmt: skip


def training_lines(project: Project, name: str, scale: float, repeats: int) -> Iterator[dict[str, Any]]:
    """T1, T1s, TR. Two steps of warm-up, the first of them timed too."""
    sequences = training_sequences(name, project.engine.model.config, scale)
    tokens = sum(map(len, sequences))
    first = seconds(lambda: project.train_step(sequences))
    project.train_step(sequences)
    optimizer: list[float] = []
    for _ in range(repeats):
        taken = seconds(lambda: optimizer.append(project.train_step(sequences)))
        yield {"metric": "useful_tok_s", "value": round(tokens / taken, 1), "seconds": round(taken, 3),
               "optimizer_s": round(optimizer.pop(), 4), "first_step_s": round(first, 2), "useful_tokens": tokens,
               "padded_tokens": tokens}  # fmt: skip


def grpo_lines(project: Project, scale: float, repeats: int) -> Iterator[dict[str, Any]]:
    """R1, after one step of warm-up."""
    work = generation("R1", project.engine.model.config, scale)
    project.grpo_step(work)
    for _ in range(repeats):
        step = project.grpo_step(work)
        yield {"metric": "step_s", "value": round(step.step_s, 3), "generation_s": round(step.rollout_s, 3),
               "score_s": 0.0, "train_s": round(step.train_s, 3), "completion_tokens": step.output_tokens,
               "tok_s": round(step.output_tokens / step.step_s, 1),
               "gen_tok_s": round(step.output_tokens / step.rollout_s, 1),
               "max_abs_logprob_difference": step.max_abs_logprob_difference}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="llama-15m", choices=list(MODELS))
    parser.add_argument("--workloads", default="W1,W2,W3,W4")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path, help="a Hugging Face directory of that model (default: random)")
    parser.add_argument("--quick", action="store_true", help="everything 16 times smaller")
    args = parser.parse_args(argv)
    scale = 1 / 16 if args.quick else 1.0
    names = args.workloads.split(",")
    works = [generation(name, MODELS[args.model], scale) for name in names if name in GENERATION]
    project = Project(MODELS[args.model], works, args.dtype, args.checkpoint)
    startup = process_age()
    lines = []
    for name in names:
        if name == "R1":
            measured = grpo_lines(project, scale, args.repeats)
        elif name in GENERATION:
            measured = generation_lines(project, name, scale, args.repeats)
        else:
            measured = training_lines(project, name, scale, args.repeats)
        for line in measured:
            line = {
                "peer": "project",
                "workload": name,
                "model": args.model,
                "dtype": args.dtype,
                **line,
                "startup_s": round(startup, 2),
                "threads": torch.get_num_threads(),
                "rss_peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
                "unix_time": round(time.time()),
                "versions": {"torch": torch.__version__},
            }
            print(json.dumps(line), flush=True)
            lines.append(line)
    return lines


if __name__ == "__main__":
    main()
