"""Wall-clock timing: warm-up first, then the candidates in turn, so that a slow minute of the machine hits all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of each timed run, in the order they ran."""

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    @property
    def best(self) -> float:
        return min(self.runs)

    @property
    def worst(self) -> float:
        return max(self.runs)


def seconds(function: Callable[[], object]) -> float:
    """One run of `function`, and of what it has left a GPU to do, without the garbage collector's pauses."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        function()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter() - start
    finally:
        if enabled:
            gc.enable()


def interleaved(
    candidates: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1, collect: bool = True
) -> dict[str, Timing]:
    """Times every candidate `repeats` times, one after another in each round, after `warmup` untimed rounds. `collect`
    frees garbage before each round."""
    for _ in range(warmup):
        for function in candidates.values():
            function()
    runs: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        if collect:
            gc.collect()
        for name, function in candidates.items():
            runs[name].append(seconds(function))
    return {name: Timing(tuple(taken)) for name, taken in runs.items()}


def per_call(candidates: Mapping[str, Callable[[], object]], repeats: int, window_s: float) -> dict[str, Timing]:
    """Like `interleaved` for short functions: each timed run repeats its function for about `window_s` seconds, and
    counts seconds per call."""
    calls: dict[str, int] = {}
    for name, function in candidates.items():
        function()
        calls[name] = max(1, round(window_s / max(seconds(function), 1e-7)))

    def loop(name: str) -> Callable[[], None]:
        function, count = candidates[name], calls[name]

        def run() -> None:
            for _ in range(count):
                function()

        return run

    timings = interleaved({name: loop(name) for name in candidates}, repeats, collect=False)
    return {name: Timing(tuple(run / calls[name] for run in t.runs)) for name, t in timings.items()}
