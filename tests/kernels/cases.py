"""What the tests of row-wise kernels share, those on a CPU and those in triton/: code paths, inputs, tables of cases,
what others come to for the same inputs, and how near is near."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels.graph import Graph
from engine.kernels.op import cpu_missing, extension, isas, use_backend, use_isa
from engine.kernels.weight import Weight

ISAS = [] if cpu_missing() else isas()[:3]  # row-wise kernels have three code paths
DTYPES = [torch.float32, torch.bfloat16]
needs_cpu = pytest.mark.skipif(bool(cpu_missing()), reason=cpu_missing() or "built")
SHARDS = [(0, 41), (41, 1), (42, 55)]  # of 97 rows: first row and size; ends inside a panel of 16, one row, the end
ADAMW = {"learning_rate": 3e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 100000},
    {"top_p": 0.3},
    {"top_p": 0.999},
    {"top_p": 1e-9},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"min_p": 1e-30},
    {"top_k": 7, "top_p": 0.6},
    {"top_k": 30, "top_p": 0.8, "min_p": 0.02},
    {"top_k": 600, "temperature": 0.1},
    {"temperature": 0.0, "top_p": 0.5},
]


def code_path(name: str) -> AbstractContextManager[None]:
    """C++ kernels for an instruction set, or the definition in torch."""
    return use_backend("torch") if name == "torch" else use_isa(name)


def weight_of(values: Tensor, dtype: torch.dtype, packed: bool = False) -> Weight:
    weight = Weight("w", tuple(values.shape), dtype, packed)
    weight.load_(values)
    return weight


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), device="cpu") * scale


def ids(shape: int | tuple[int, ...], vocab: int, seed: int = 0) -> Tensor:
    """Ids under `vocab`, int32."""
    size = (shape,) if isinstance(shape, int) else shape
    return torch.randint(0, vocab, size, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def warmth(rows: int, seed: int = 0) -> Tensor:
    """Temperatures, or their inverses, from 0.5 to 1.5."""
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed)) + 0.5


def sampling(
    rows: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 11,
    counter: Tensor | None = None,
) -> list[Tensor]:
    """What `sample_token` takes beside logits: the same for all rows, but for the counter."""
    return [
        torch.full((rows,), temperature),
        torch.full((rows,), top_k, dtype=torch.int32),
        torch.full((rows,), top_p),
        torch.full((rows,), min_p),
        torch.full((rows,), seed),
        torch.arange(rows) if counter is None else counter,
    ]


def exact_logprobs(logits: Tensor, targets: Tensor, inverse: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """In float64: log-probabilities of targets [R, n], and entropies [R]; differentiable."""
    z = logits.double() if inverse is None else logits.double() * inverse.double()[:, None]
    logp = torch.log_softmax(z, -1)
    return logp.gather(1, targets.long()), -(logp * logp.exp()).sum(-1)


def adamw_of_torch(shape: tuple[int, ...], count: int = 3, grad_scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Master and moments after `count` of torch's steps with the settings ADAMW, from gradients of seeds 1, 2, .."""
    theirs = torch.nn.Parameter(randn(*shape))
    optimizer = torch.optim.AdamW(
        [theirs],
        lr=ADAMW["learning_rate"],
        betas=(ADAMW["beta1"], ADAMW["beta2"]),
        eps=ADAMW["eps"],
        weight_decay=ADAMW["weight_decay"],
    )
    for step in range(1, count + 1):
        theirs.grad = randn(*shape, seed=step) * grad_scale
        optimizer.step()
    state = optimizer.state[theirs]
    return theirs.detach(), state["exp_avg"], state["exp_avg_sq"]


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
