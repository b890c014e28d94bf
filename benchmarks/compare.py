"""Engines that took turns on one machine, side by side: JSON lines in, a Markdown table out.

    python -m benchmarks.compare results.jsonl [--results DIRECTORY]

A line has "peer", "model", "workload", "metric", "value"; ours have the peer "project" (benchmarks.peers prints them),
the machine's own limits the peer "machine". The share of the limit is taken as in the other benchmarks: the least
work that the tokens need over the bf16 GEMM peak, for W1 the bytes of the weights over the bandwidth of memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import processor, slug
from benchmarks.table import aligned, figure
from benchmarks.workloads import (
    MODELS,
    generation,
    generation_flops,
    grpo_flops,
    size,
    training_flops,
    training_lengths,
)

RESULTS = Path(__file__).parent / "results"
UNITS = {"decode_tok_s": "tok/s", "out_tok_s": "tok/s", "useful_tok_s": "tok/s", "step_s": "s"}
TRAINING = ("T1", "T1s", "TR")
HEADER = ["model", "workload", "caduceus", "of the limit", "best peer", "ours is better by", "the other peers"]


def share(model: str, workload: str, value: float, limits: dict[str, float]) -> str:
    """The part of the machine's limit that a figure comes to; empty where the limit was not measured."""
    config = MODELS[model]
    if workload == "W1":
        if "dram_read_gbs" not in limits:
            return ""
        return f"{100 * value * 2 * size(config).weights / 1e9 / limits['dram_read_gbs']:.0f}% of memory reads"
    if "gemm_2048_gflops" not in limits:
        return ""
    if workload == "R1":
        rate = grpo_flops(config, generation("R1", config)) / value
    elif workload in TRAINING:
        lengths = training_lengths(workload)
        rate = training_flops(config, lengths) * value / sum(lengths)
    else:
        work = generation(workload, config)
        rate = generation_flops(config, work) * value / work.output_tokens
    return f"{100 * rate / 1e9 / limits['gemm_2048_gflops']:.0f}% of GEMM"


def machine_limits(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Medians of the bf16 GEMM peak and the bandwidth of memory, GFLOP/s and GB/s, at the most threads measured."""
    own = [line for line in lines if line["peer"] == "machine" and line.get("dtype") in ("bfloat16", "-")]
    most = max((line["threads"] for line in own), default=0)
    found = defaultdict(list)
    for line in own:
        if line["threads"] == most:
            found[line["metric"]].append(float(line["value"]))
    return {metric: statistics.median(values) for metric, values in found.items()}


def table(lines: list[dict[str, Any]]) -> str:
    """One row for each model and workload that we ran."""
    limits = machine_limits(lines)
    figures: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    units = {}
    for line in lines:
        if line["peer"] != "machine" and line.get("value") is not None:
            plain = line.get("dtype") in ("bf16", "bfloat16")
            peer = line["peer"] if plain or line["peer"] == "project" else f"{line['peer']} {line['dtype']}"
            figures[line["model"], line["workload"]][peer].append(float(line["value"]))
            units[line["workload"]] = UNITS[line["metric"]]
    rows = []
    for (model, workload), peers in sorted(
        figures.items(), key=lambda item: (list(MODELS).index(item[0][0]), item[0][1])
    ):
        if "project" not in peers:
            continue
        ours = peers.pop("project")
        mine, unit = statistics.median(ours), units[workload]
        lower = unit == "s"
        medians = {peer: statistics.median(values) for peer, values in peers.items()}
        order = sorted(medians, key=lambda peer: medians[peer], reverse=not lower)
        named = [f"{peer} {figure(medians[peer])}" for peer in order]
        ratio = "" if not order else f"{(medians[order[0]] / mine if lower else mine / medians[order[0]]):.2f}x"
        spread = f" ({figure(min(ours))}–{figure(max(ours))}, n={len(ours)})" if len(ours) > 1 else ""
        best, others = (named[0], ", ".join(named[1:])) if named else ("", "")
        rows.append(
            [
                model,
                workload,
                f"{figure(mine)} {unit}{spread}",
                share(model, workload, mine, limits),
                best,
                ratio,
                others,
            ]
        )
    return aligned(HEADER, rows)


def main(argv: Sequence[str] | None = None) -> str:
    """Prints the table, and writes it to <directory>/<machine>-peers.md where a directory is given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("lines", type=Path, help="a file of JSON lines")
    parser.add_argument("--results", type=Path, nargs="?", const=RESULTS, help=f"write there too (default {RESULTS})")
    args = parser.parse_args(argv)
    lines = [json.loads(line) for line in args.lines.read_text().splitlines() if line.strip()]
    limits = machine_limits(lines)
    measured = ", ".join(f"{metric.replace('_', ' ')} {value:.0f}" for metric, value in sorted(limits.items()))
    text = (
        f"# {processor()}: engines in turn\n\nThe machine's limits: {measured or 'not measured'}.\n\n{table(lines)}\n"
    )
    print(text)
    if args.results is not None:
        args.results.mkdir(parents=True, exist_ok=True)
        (args.results / f"{slug(processor())}-peers.md").write_text(text)
    return text


if __name__ == "__main__":
    main()
