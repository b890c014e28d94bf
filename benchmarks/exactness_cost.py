"""What exactness costs: every op that torch does not do row-invariantly, and whole steps, against torch's own version.

    python -m benchmarks.exactness_cost --model llama-110m

Our kernels have no inexact mode that could be timed beside them, so the price is taken against the fastest thing at
hand that makes no promise: torch's matmul and SDPA at the same shapes, and transformers for whole steps. A negative
cost means that the exact kernel is the faster one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch

from benchmarks import cli
from benchmarks.attention_cases import attention_cases
from benchmarks.cases import QUICK, SIZES, linear_cases, on_device
from benchmarks.project import Project
from benchmarks.table import aligned
from benchmarks.timing import Timing, interleaved, per_call
from benchmarks.transformers_peer import TransformersPeer
from benchmarks.workloads import Generation, generation, training_sequences

HEADER = ["what", "shape", "exact", "not exact", "cost of exactness"]


def duration(seconds: float) -> str:
    return (
        f"{seconds * 1e6:.0f} us"
        if seconds < 1e-3
        else f"{seconds * 1e3:.1f} ms"
        if seconds < 1
        else f"{seconds:.2f} s"
    )


def result(what: str, shape: str, exact: Timing, inexact: Timing) -> dict[str, Any]:
    return {
        "what": what,
        "shape": shape,
        "exact_s": exact.median,
        "inexact_s": inexact.median,
        "cost": exact.median / inexact.median - 1,
    }


def whole_steps(
    ours: Project, peer: TransformersPeer, sequences: list[list[int]], work: Generation
) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Scoring, a training step and a rollout: (ours, transformers)."""
    ids = torch.tensor(sequences, device=peer.device)

    @torch.inference_mode()
    def score() -> torch.Tensor:
        logits = peer.model.eval()(input_ids=ids).logits[:, :-1].float()
        return logits.log_softmax(-1).gather(2, ids[:, 1:, None])

    return {
        "score": (lambda: ours.engine.score(sequences), score),
        "training step": (lambda: ours.train_step(sequences), lambda: peer.train_step(sequences)),
        "rollout": (lambda: ours.generate(work), lambda: peer.generate(work)),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = cli.parse(__doc__ or "", argv)
    limits = cli.limits(args)
    dtype, window_s = getattr(torch, args.dtype), 0.001 if args.quick else 0.05
    sizes = QUICK if args.quick else SIZES[args.device]
    results = []
    with torch.inference_mode():
        linear = list(on_device(args.device, linear_cases(args.config, dtype, [1, sizes.few_rows, sizes.rows])))
    attention = on_device(args.device, attention_cases(args.config, dtype, list(sizes.lengths), sizes.decode))
    with_torch = (case for case in attention if "e4m3" not in case.op)  # torch has nothing to put beside it
    for case in chain(linear, with_torch):
        assert case.torch is not None  # every op here has a counterpart
        others = {"torch": case.torch} | case.backends
        taken = per_call({"exact": case.ours} | others, args.repeats, window_s)
        fastest = min((taken[name] for name in others), key=lambda timing: timing.median)
        results.append(result(case.op, case.shape, taken["exact"], fastest))
    del linear, case
    if args.peer == "transformers":
        work, sequences = generation("W2s", args.config, args.scale), training_sequences("T1", args.config, args.scale)
        ours = Project(args.config, [work], args.dtype, device=args.device)
        peer = TransformersPeer(args.config, args.dtype, args.device)
        shapes = {"rollout": f"{work.output_tokens} tokens out"}
        for name, (exact, inexact) in whole_steps(ours, peer, sequences, work).items():
            taken = interleaved({"exact": exact, "inexact": inexact}, args.repeats, warmup=1 if args.quick else 2)
            shape = shapes.get(name, f"{len(sequences)} x {len(sequences[0])}")
            results.append(result(name, shape, taken["exact"], taken["inexact"]))
    print(f"exactness_cost, {args.model}, {args.dtype}. {limits.describe()}\n")
    lines = [
        [r["what"], r["shape"], duration(r["exact_s"]), duration(r["inexact_s"]), f"{100 * r['cost']:+.0f}%"]
        for r in results
    ]
    print(aligned(HEADER, lines) + "\n")
    summary = {
        "benchmark": "exactness_cost",
        "model": args.model,
        "dtype": args.dtype,
        "machine": limits.as_json(),
        "rows": results,
    }
    print(json.dumps(summary), flush=True)
    return summary


if __name__ == "__main__":
    main()
