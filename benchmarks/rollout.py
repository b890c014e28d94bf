"""W2, W3, W4, batches of samples with log-probabilities: output tokens per second, and the share of the GEMM peak that
the least work for these tokens comes to.

    python -m benchmarks.rollout --model llama-110m --workloads W2,W3
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import cli
from benchmarks.decode import Generator
from benchmarks.project import Project
from benchmarks.table import Row, compare, peer_rows, show
from benchmarks.timing import interleaved
from benchmarks.transformers_peer import TransformersPeer
from benchmarks.workloads import generation, generation_flops


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = cli.parse(__doc__ or "", argv, workloads="W2,W3,W4")
    limits = cli.limits(args)
    works = [generation(name, args.config, args.scale) for name in args.workloads.split(",")]
    engines: list[Generator] = [Project(args.config, works, args.dtype, device=args.device)]
    if args.peer == "transformers":
        engines.append(TransformersPeer(args.config, args.dtype, args.device))
    rows: list[Row] = []
    for work in works:
        flops = generation_flops(args.config, work)

        def share(tokens_per_second: float, flops: int = flops, tokens: int = work.output_tokens) -> tuple[float, str]:
            return flops * tokens_per_second / tokens / limits.gemm(args.dtype), "of GEMM"

        for engine in engines:  # as every peer is warmed up: two prompts, a few tokens
            engine.generate(work.head(2, 8))
        jobs = {engine.name: (lambda engine=engine, work=work: engine.generate(work)) for engine in engines}
        taken = interleaved(jobs, args.repeats, warmup=0)
        mine = []
        for engine in engines:
            row = Row(work.name, engine.name, [work.output_tokens / s for s in taken[engine.name].runs], "out tok/s")
            row.share, row.limit = share(row.value)
            mine.append(row)
        mine += peer_rows(args.peer_results, args.model, work.name, "out tok/s", share)
        compare(mine)
        rows += mine
    return show("rollout", args.model, limits, rows, dtype=args.dtype)


if __name__ == "__main__":
    main()
