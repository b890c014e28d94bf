"""T1, TR, one training step: forward, backward and AdamW; useful tokens per second and the share of the GEMM peak.

python -m benchmarks.train_step --model llama-110m --workloads T1,TR
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import cli
from benchmarks.project import Project
from benchmarks.table import Row, compare, peer_rows, show
from benchmarks.timing import interleaved
from benchmarks.transformers_peer import TransformersPeer
from benchmarks.workloads import training_flops, training_sequences


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = cli.parse(__doc__ or "", argv, workloads="T1,TR")
    limits = cli.limits(args)
    engines: list[Any] = [Project(args.config, [], args.dtype, device=args.device)]
    if args.peer == "transformers":
        engines.append(TransformersPeer(args.config, args.dtype, args.device))
    rows: list[Row] = []
    for name in args.workloads.split(","):
        sequences = training_sequences(name, args.config, args.scale)
        lengths = [len(s) for s in sequences]
        flops = training_flops(args.config, lengths)

        def share(tokens_per_second: float, flops: int = flops, tokens: int = sum(lengths)) -> tuple[float, str]:
            return flops * tokens_per_second / tokens / limits.gemm(args.dtype), "of GEMM"

        jobs = {e.name: (lambda e=e, sequences=sequences: e.train_step(sequences)) for e in engines}
        # Two steps of warm-up: the second still pays for fresh pages of the optimizer's state.
        taken = interleaved(jobs, args.repeats, warmup=1 if args.quick else 2)
        mine = []
        for engine in engines:
            row = Row(name, engine.name, [sum(lengths) / s for s in taken[engine.name].runs], "tok/s")
            row.share, row.limit = share(row.value)
            mine.append(row)
        mine += peer_rows(args.peer_results, args.model, name, "tok/s", share)
        compare(mine)
        rows += mine
    return show("train_step", args.model, limits, rows, dtype=args.dtype)


if __name__ == "__main__":
    main()
