"""Every op alone, at the shapes of one model: operations or bytes per second, the share of the machine's limit, torch.

    python -m benchmarks.kernels --model llama-110m
    python -m benchmarks.kernels --model llama-8b --device cuda

Of attention on a GPU, each of torch's backends is measured and the fastest shown. Inputs stay in the cache from one
call to the next, so what is bound by memory can read faster than memory does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import cli, machine
from benchmarks.cases import QUICK, SIZES, Case, all_cases, on_device
from benchmarks.table import aligned, figure
from benchmarks.timing import per_call

HEADER = ["op", "shape", "ours", "of the limit", "torch", "ours is better by"]


def measure_case(case: Case, limits: machine.Machine, dtype: str, repeats: int, window_s: float) -> dict[str, Any]:
    """Rate of ours and of torch's version (the fastest, where it has several), the share of the limit, the ratio."""
    candidates = {"ours": case.ours} | ({"torch": case.torch} if case.torch else {}) | case.backends
    taken = per_call(candidates, repeats, window_s)
    rates = {name: case.work / timing.median for name, timing in taken.items()}
    theirs = {name: rate for name, rate in rates.items() if name != "ours"}
    best = max(theirs, key=lambda name: theirs[name], default=None)
    limit = limits.gemm(dtype) if case.kind == "flops" else limits.read_memory
    return {
        "op": case.op,
        "shape": case.shape,
        "kind": case.kind,
        "seconds": taken["ours"].median,
        "rate": rates["ours"],
        "share_of_limit": rates["ours"] / limit,
        "torch_rate": theirs[best] if best else None,
        "torch_backend": best,
        "torch_rates": theirs,
        "ours_is_better_by": rates["ours"] / theirs[best] if best else None,
    }


def cells(result: dict[str, Any]) -> list[str]:
    unit, limit = ("GFLOP/s", "of GEMM") if result["kind"] == "flops" else ("GB/s", "of memory reads")
    return [
        result["op"],
        result["shape"],
        f"{figure(result['rate'] / 1e9)} {unit}",
        f"{100 * result['share_of_limit']:.0f}% {limit}",
        f"{figure(result['torch_rate'] / 1e9)}{_backend(result)}" if result["torch_rate"] else "",
        f"{result['ours_is_better_by']:.2f}x" if result["ours_is_better_by"] else "",
    ]


def _backend(result: dict[str, Any]) -> str:
    return "" if result["torch_backend"] == "torch" else f" ({result['torch_backend']})"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = cli.parse(__doc__ or "", argv)
    limits = cli.limits(args)
    dtype, window_s = getattr(torch, args.dtype), 0.001 if args.quick else 0.05
    sizes = QUICK if args.quick else SIZES[args.device]
    results = [
        measure_case(case, limits, args.dtype, args.repeats, window_s)
        for case in on_device(args.device, all_cases(args.config, dtype, sizes))
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
