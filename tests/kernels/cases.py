"""What the tests of row-wise kernels share: code paths, weights from tensors, and how near is near."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels.graph import Graph
from engine.kernels.op import cpu_missing, extension, isas
from engine.kernels.weight import Weight

ISAS = [] if cpu_missing() else isas()[:3]  # row-wise kernels have three code paths
DTYPES = [torch.float32, torch.bfloat16]
needs_cpu = pytest.mark.skipif(bool(cpu_missing()), reason=cpu_missing() or "built")


def weight_of(values: Tensor, dtype: torch.dtype, packed: bool = False) -> Weight:
    weight = Weight("w", tuple(values.shape), dtype, packed)
    weight.load_(values)
    return weight


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), device="cpu") * scale


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = extension().num_threads()
    extension().set_num_threads(count)
    try:
        yield
    finally:
        extension().set_num_threads(before)


def grad_of(tensor: Tensor | Weight) -> Tensor:
    assert tensor.grad is not None, "no gradient arrived"
    return tensor.grad


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value, wherever the two lie."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype, ulps: float = 2.0) -> None:
    """Within `ulps` roundings of `dtype`, relative to the largest expected value."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} against {tuple(expected.shape)}"
    limit = ulps * torch.finfo(dtype).eps
    error = relative_error(actual, expected)
    assert error <= limit, f"relative error {error:.2e}, limit {limit:.2e}"


def record(build: Callable[[], Any]) -> tuple[Graph, Any]:
    """Records `build()`; returns the graph and what it returned, whose memory a replay fills."""
    with Graph() as graph:
        outputs = build()
    return graph, outputs
