"""W1, one sequence at a time: tokens per second of decoding, against the bandwidth at which the weights can be read.

python -m benchmarks.decode --model llama-110m
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from benchmarks import cli
from benchmarks.project import Project
from benchmarks.table import Row, compare, peer_rows, show
from benchmarks.timing import interleaved
from benchmarks.transformers_peer import TransformersPeer
from benchmarks.workloads import Generation, generation, size


class Generator(Protocol):
    """An engine under test."""

    name: str

    def generate(self, work: Generation, max_new: int | None = None) -> Any: ...


def decode_speed(engines: Sequence[Generator], work: Generation, repeats: int) -> list[tuple[list[float], list[float]]]:
    """(decoded tokens per second, seconds to the first token) of each engine, one figure a run: the time of all tokens
    less the time of the first one, so that the prompt does not count."""
    jobs = {}
    for index, engine in enumerate(engines):
        jobs[f"{index} first"] = lambda engine=engine: engine.generate(work, 1)
        jobs[f"{index} all"] = lambda engine=engine: engine.generate(work)
    taken = interleaved(jobs, repeats)
    speeds = []
    for index in range(len(engines)):
        first, whole = taken[f"{index} first"].runs, taken[f"{index} all"].runs
        decoded = work.max_new[0] - 1
        speeds.append(([decoded / max(b - a, 1e-9) for a, b in zip(first, whole, strict=True)], list(first)))
    return speeds


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = cli.parse(__doc__ or "", argv)
    limits = cli.limits(args)
    work = generation("W1", args.config, args.scale)
    engines: list[Generator] = [Project(args.config, [work], args.dtype, device=args.device)]
    if args.peer == "transformers":
        engines.append(TransformersPeer(args.config, args.dtype, args.device))
    weight_bytes = size(args.config).weights * (2 if args.dtype == "bfloat16" else 4)
    of_its_size = limits.reads_of(weight_bytes, repeats=1 if args.quick else 5)

    def share(tokens_per_second: float) -> tuple[float, str]:
        return tokens_per_second * weight_bytes / limits.read_memory, "of memory reads"

    rows = []
    for engine, (speeds, first) in zip(engines, decode_speed(engines, work, args.repeats), strict=True):
        row = Row("W1", engine.name, speeds, "tok/s", more={"first_token_s": sorted(first)[len(first) // 2]})
        row.share, row.limit = share(row.value)
        row.more["share_of_reads_of_its_size"] = row.value * weight_bytes / of_its_size
        rows.append(row)
    rows += peer_rows(args.peer_results, args.model, "W1", "tok/s", share)
    compare(rows)
    print(
        f"The weights are {weight_bytes / 1e6:.0f} MB a token; a buffer of that size reads at {of_its_size / 1e9:.1f} "
        f"GB/s here, of which ours is {100 * rows[0].more['share_of_reads_of_its_size']:.0f}%.\n"
    )
    return show("decode", args.model, limits, rows, dtype=args.dtype, weight_bytes=weight_bytes,
                read_bandwidth_of_that_size=of_its_size)  # fmt: skip


if __name__ == "__main__":
    main()
