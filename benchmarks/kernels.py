"""Every op alone, at the shapes of one model: operations or bytes per second, the share of the machine's limit, torch.

    python -m benchmarks.kernels --model llama-110m
    python -m benchmarks.kernels --model llama-8b --device cuda

Of attention on a GPU, each of our backends has rows of its own (`--backends` chooses), beside each of torch's and
flash-attn, where it is installed: the fastest of torch's is in the first table, every one in the second. What exactness
costs is our time over that of the fastest of them all, which promise nothing. Inputs stay in the cache from one call to
the next, so what is bound by memory can read faster than memory does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from benchmarks import cli, machine
from benchmarks.attention_cases import exact_backends
from benchmarks.case import Case
from benchmarks.cases import QUICK, SIZES, all_cases, on_device
from benchmarks.flash_attention import flash_attentions
from benchmarks.table import aligned, figure
from benchmarks.timing import per_call

HEADER = ["op", "shape", "ours", "of the limit", "torch", "ours is better by", "exactness costs"]
OTHERS = ["op", "shape", "beside ours", "rate", "ours is better by"]


def measure_case(case: Case, limits: machine.Machine, dtype: str, repeats: int, window_s: float) -> dict[str, Any]:
    """Rate of ours and of torch's version (the fastest, where it has several), the share of the limit, the ratio."""
    torchs = ({"torch": case.torch} if case.torch else {}) | case.backends
    refusals = {name: reason for name, run in case.peers.items() if (reason := refusal(run))}
    peers = {name: run for name, run in case.peers.items() if name not in refusals}
    taken = per_call({"ours": case.ours} | torchs | peers, repeats, window_s)
    rates = {name: case.work / timing.median for name, timing in taken.items()}
    best = max(torchs, key=lambda name: rates[name], default=None)
    limit = limits.gemm(dtype) if case.kind == "flops" else limits.read_memory
    others = max((rate for name, rate in rates.items() if name != "ours"), default=None)
    return {
        "op": case.op,
        "shape": case.shape,
        "kind": case.kind,
        "seconds": taken["ours"].median,
        "rate": rates["ours"],
        "share_of_limit": rates["ours"] / limit,
        "torch_rate": rates[best] if best else None,
        "torch_backend": best,
        "torch_rates": {name: rates[name] for name in torchs},
        "peer_rates": {name: rates[name] for name in peers},
        "peers_that_failed": refusals,
        "ours_is_better_by": rates["ours"] / rates[best] if best else None,
        "exactness_cost": others / rates["ours"] - 1 if others else None,
    }


def refusal(run: Callable[[], object]) -> str:
    """Why another package's function cannot be measured; empty where it runs."""
    try:
        run()
    except Exception as error:  # whatever it raises is its own matter, and no reason to lose all other figures
        return in_a_line(error)
    return ""


def in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def measure_all(
    cases: Iterable[Case], limits: machine.Machine, dtype: str, repeats: int, window_s: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """The results, and a line for each case that failed: the others are worth having all the same."""
    results, failed = [], []
    for case in cases:
        try:
            results.append(measure_case(case, limits, dtype, repeats, window_s))
        except Exception as error:  # of any of our kernels, or of torch's
            failed.append(f"{case.op}, {case.shape}: {in_a_line(error)}")
    return results, failed


def cells(result: dict[str, Any], limits: machine.Machine) -> list[str]:
    """The row of the first table."""
    limit = "of GEMM" if result["kind"] == "flops" else f"of {limits.memory_limit}"
    return [
        result["op"],
        result["shape"],
        _rate(result, result["rate"]),
        f"{100 * result['share_of_limit']:.0f}% {limit}",
        f"{_rate(result, result['torch_rate'])}{_backend(result)}" if result["torch_rate"] else "",
        f"{result['ours_is_better_by']:.2f}x" if result["ours_is_better_by"] else "",
        f"{100 * result['exactness_cost']:+.0f}%" if result["exactness_cost"] is not None else "",
    ]


def other_cells(result: dict[str, Any]) -> list[list[str]]:
    """Rows of the second table: all of torch's backends, where it has several, and the peers."""
    torchs = result["torch_rates"] if len(result["torch_rates"]) > 1 else {}
    return [
        [result["op"], result["shape"], name, _rate(result, rate), f"{result['rate'] / rate:.2f}x"]
        for name, rate in (torchs | result["peer_rates"]).items()
    ]


def _rate(result: dict[str, Any], rate: float) -> str:
    if result["kind"] == "bytes":
        return f"{figure(rate / 1e9)} GB/s"
    return f"{figure(rate / 1e12)} TFLOP/s" if rate >= 1e13 else f"{figure(rate / 1e9)} GFLOP/s"


def _backend(result: dict[str, Any]) -> str:
    return "" if result["torch_backend"] == "torch" else f" ({result['torch_backend']})"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = cli.parse(__doc__ or "", argv, backends=True)
    limits = cli.limits(args)
    dtype, window_s = getattr(torch, args.dtype), 0.001 if args.quick else 0.05
    sizes = QUICK if args.quick else SIZES[args.device]
    peers, notes = flash_attentions(dtype) if args.device == "cuda" else ([], [])
    backends = args.backends.split(",") if args.backends else exact_backends() if args.device == "cuda" else []
    cases = on_device(args.device, all_cases(args.config, dtype, sizes, backends, peers))
    results, failed = measure_all(cases, limits, args.dtype, args.repeats, window_s)
    notes += sorted({f"{name} ({reason})" for r in results for name, reason in r["peers_that_failed"].items()})
    print(f"kernels, {args.model}, {args.dtype}. {limits.describe()}\n")
    print(aligned(HEADER, [cells(result, limits) for result in results]) + "\n")
    if others := [line for result in results for line in other_cells(result)]:
        print(aligned(OTHERS, others) + "\n")
    if notes:
        print(f"Not measured: {'; '.join(notes)}.\n")
    if failed:
        print("Failed:\n\n" + "\n".join(f"- {line}" for line in failed) + "\n")
    summary = {
        "benchmark": "kernels",
        "model": args.model,
        "dtype": args.dtype,
        "machine": limits.as_json(),
        "rows": results,
        "not_measured": notes,
        "failed": failed,
    }
    print(json.dumps(summary), flush=True)
    return summary


if __name__ == "__main__":
    sys.exit(bool(main()["failed"]))
