"""R1, a whole GRPO step: seconds for the rollout of 32 samples and the gradient over them, and where they went.

python -m benchmarks.grpo_step --model llama-110m
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks import cli
from benchmarks.project import Project
from benchmarks.table import Row, compare, peer_rows, show
from benchmarks.transformers_peer import TransformersPeer
from benchmarks.workloads import generation, grpo_flops


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = cli.parse(__doc__ or "", argv)
    limits = cli.limits(args)
    work = generation("R1", args.config, args.scale)
    flops = grpo_flops(args.config, work)

    def share(step_seconds: float) -> tuple[float, str]:
        return flops / step_seconds / limits.gemm(args.dtype), "of GEMM"

    ours = Project(args.config, [work], args.dtype, device=args.device)
    peer = TransformersPeer(args.config, args.dtype, args.device) if args.peer == "transformers" else None
    steps, peer_steps = [], []
    for _ in range(1 + args.repeats):  # the first step of each is warm-up
        steps.append(ours.grpo_step(work))
        if peer is not None:
            peer_steps.append(peer.grpo_step(work))
    steps, peer_steps = steps[1:], peer_steps[1:]
    difference = max(step.max_abs_logprob_difference for step in steps)
    rows = [Row("R1", ours.name, [step.step_s for step in steps], "s/step")]
    rows[0].more = {
        "rollout_s": statistics.median(step.rollout_s for step in steps),
        "train_s": statistics.median(step.train_s for step in steps),
        "max_abs_logprob_difference": difference,
    }
    if peer is not None:
        rows.append(Row("R1", f"{peer.name}, plain loop", [sum(step) for step in peer_steps], "s/step"))
        rows[1].more = {
            "rollout_s": statistics.median(step[0] for step in peer_steps),
            "train_s": statistics.median(step[1] for step in peer_steps),
        }
    for row in rows:
        row.share, row.limit = share(row.value)
    rows += peer_rows(args.peer_results, args.model, "R1", "s/step", share)
    compare(rows, lower_is_better=True)
    for row in rows:
        if row.more:
            print(f"{row.engine}: rollout {row.more['rollout_s']:.2f} s, training {row.more['train_s']:.2f} s")
    print(f"Largest difference between sampled and trained log-probability: {difference}\n")
    return show("grpo_step", args.model, limits, rows, dtype=args.dtype)


if __name__ == "__main__":
    main()
