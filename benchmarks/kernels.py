"""Every op alone, at the shapes of one model: operations or bytes per second, the share of the machine's limit, torch.

    python -m benchmarks.kernels --model llama-110m

Inputs stay in the cache from one call to the next, so what is bound by memory can read faster than memory does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import cli, machine
from benchmarks.cases import Case, all_cases
from benchmarks.table import aligned, figure
from benchmarks.timing import per_call

HEADER = ["op", "shape", "ours", "of the limit", "torch", "ours is better by"]


def measure_case(case: Case, limits: machine.Machine, dtype: str, repeats: int, window_s: float) -> dict[str, Any]:
    """Rate of ours and of torch's version, the share of the limit, the ratio."""
    candidates = {"ours": case.ours} | ({"torch": case.torch} if case.torch else {})
    taken = per_call(candidates, repeats, window_s)
    rates = {name: case.work / timing.median for name, timing in taken.items()}
    limit = limits.gemm(dtype) if case.kind == "flops" else limits.read_memory
    return {
        "op": case.op,
        "shape": case.shape,
        "kind": case.kind,
        "seconds": taken["ours"].median,
        "rate": rates["ours"],
        "share_of_limit": rates["ours"] / limit,
        "torch_rate": rates.get("torch"),
        "ours_is_better_by": rates["ours"] / rates["torch"] if "torch" in rates else None,
    }


def cells(result: dict[str, Any]) -> list[str]:
    unit, limit = ("GFLOP/s", "of GEMM") if result["kind"] == "flops" else ("GB/s", "of memory reads")
    return [
        result["op"],
        result["shape"],
        f"{figure(result['rate'] / 1e9)} {unit}",
        f"{100 * result['share_of_limit']:.0f}% {limit}",
        f"{figure(result['torch_rate'] / 1e9)}" if result["torch_rate"] else "",
        f"{result['ours_is_better_by']:.2f}x" if result["ours_is_better_by"] else "",
    ]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = cli.parse(__doc__ or "", argv)
    limits = machine.measure(args.quick)
    dtype, rows, window_s = getattr(torch, args.dtype), 32 if args.quick else 2048, 0.001 if args.quick else 0.05
    results = [
        measure_case(case, limits, args.dtype, args.repeats, window_s) for case in all_cases(args.config, dtype, rows)
    ]
    print(f"kernels, {args.model}, {args.dtype}. {limits.describe()}\n")
    print(aligned(HEADER, [cells(result) for result in results]) + "\n")
    summary = {
        "benchmark": "kernels",
        "model": args.model,
        "dtype": args.dtype,
        "machine": limits.as_json(),
        "rows": results,
    }
    print(json.dumps(summary), flush=True)
    return summary


if __name__ == "__main__":
    main()
