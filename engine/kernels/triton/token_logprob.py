"""Log-probability and entropy of given tokens on a GPU, and the gradient with respect to the logits.

# R rows, V vocabulary, n targets of a row
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.graph import empty
from engine.kernels.token_logprob import Upstream
from engine.kernels.triton.launch import launch
from engine.kernels.triton.softmax_row import logprob_of, row_statistics, scale_of

_TARGETS = 16  # of a row at a time
_BLOCK = 2048  # columns of a program of the backward


def forward(logits: Tensor, targets: Tensor, inv_temperature: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [R, n] of targets int32 [R, n], entropy [R], and maximum and log total [R, 2]; all float32.

    A target outside the vocabulary is NaN.
    """
    (rows, vocab), count = logits.shape, targets.shape[1]
    logprobs, entropy, stats = (
        torch.empty(shape, dtype=torch.float32, device=logits.device) for shape in ((rows, count), (rows,), (rows, 2))
    )
    _, by_row = row_statistics(logits, inv_temperature)
    inputs, outputs = (logits, targets, inv_temperature, by_row), (logprobs, entropy, stats)
    launch(_forward, (rows,), *inputs, *outputs, vocab, count, TARGETS=_TARGETS, num_warps=1)
    return logprobs, entropy, stats


def backward(logits: Tensor, given: Upstream, dtype: torch.dtype) -> Tensor:
    """Of a row's logits, or of a shard of them; float32 is written over the logits."""
    rows, vocab = logits.shape
    d_logits = logits if dtype == logits.dtype else empty((rows, vocab), dtype, logits.device)
    launch(_backward, (rows, triton.cdiv(vocab, _BLOCK)), logits, *given, d_logits, vocab, BLOCK=_BLOCK)
    return d_logits


@triton.jit
def _forward(
    logits, targets, inv_temperature, by_row, logprobs, entropy, stats, vocab, count, TARGETS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scale = scale_of(inv_temperature, None, row)
    whole, total = tl.load(by_row + 4 * row), tl.load(by_row + 4 * row + 1)
    moment, log_total = tl.load(by_row + 4 * row + 2), tl.load(by_row + 4 * row + 3)
    tl.store(entropy + row, (log_total - moment / total).to(tl.float32))
    tl.store(stats + 2 * row, whole.to(tl.float32))
    tl.store(stats + 2 * row + 1, log_total.to(tl.float32))
    for first in range(0, count, TARGETS):
        i = first + tl.arange(0, TARGETS)
        target = tl.load(targets + row * count + i, mask=i < count, other=-1)
        inside = (target >= 0) & (target < vocab)
        z = tl.load(logits + row * vocab + target, mask=inside, other=float("nan")) * scale
        tl.store(logprobs + row * count + i, logprob_of(z, whole, log_total), mask=i < count)


@triton.jit
def _backward(
    logits, targets, inv_temperature, stats, entropy, d_logprobs, d_entropy, d_logits, vocab, BLOCK: tl.constexpr
):
    """inv_temperature (g (onehot - p) - h p (log p + entropy)), g, h the gradients of log-probability and entropy."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab
    scale = scale_of(inv_temperature, None, row)
    largest, log_total = tl.load(stats + 2 * row), tl.load(stats + 2 * row + 1)
    g, h = tl.load(d_logprobs + row), tl.load(d_entropy + row)
    offset = g + h * tl.load(entropy + row)
    z = tl.load(logits + row * vocab + columns, mask=inside, other=float("-inf"))
    logp = tl.maximum(z * scale - largest - log_total, -200.0)  # -inf * 0 must be 0
    chosen = tl.where(columns == tl.load(targets + row), g, 0.0)
    grad = scale * (chosen - tl.exp(logp) * tl.fma(logp, h, offset))
    tl.store(d_logits + row * vocab + columns, grad.to(d_logits.dtype.element_ty), mask=inside)
