"""log p(token) where each rank holds a shard of the vocabulary: statistics to exchange, the fold, and the gradient.

No rank ever sees another's logits. Each sends three numbers a row (Megatron-LM's vocabulary-parallel cross entropy,
arXiv 1909.08053, with the entropy's moment beside the total) and one for each target; everyone folds them in the order
of the shards, so every rank gets the same bits. One shard gives the bits of `token_logprob`.

# p shards, R rows, V columns of one shard, n targets a row
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.errors import InputError
from engine.kernels.checks import address, check
from engine.kernels.dtypes import KERNEL_DTYPES, TRITON_DTYPES, wide_dtype
from engine.kernels.op import Backend, Op, cpu_backend, extension, triton_backend
from engine.kernels.token_logprob import Upstream, logits_gradient_cpu


def shard_targets(tokens: Tensor, first_row: int, rows: int) -> Tensor:
    """Token ids as columns of the shard [first_row, first_row + rows): int32, -1 where another shard has the token."""
    local = tokens - first_row
    return local.where((local >= 0) & (local < rows), -1).int()


def shard_statistics(logits: Tensor, targets: Tensor, inv_temperature: Tensor | None = None) -> Tensor:
    """What this shard knows of each row's softmax: float64 [R, 3 + n].

    `logits` float32 (or float64) [R, V]; `targets` int32 [R, n], columns of this shard or -1 where the target is in
    another; `inv_temperature` float32 [R] or None for ones. With z = logit * inv_temperature the columns are max z, sum
    exp(z - max), sum exp(z - max) (z - max), and z of each target, -inf where it is -1. A shard of nothing but -inf has
    no mass: its sums are 0. Raises InputError for a shape, dtype or target that does not fit; targets on a GPU are not
    read back, and one outside the shard is taken for another shard's.
    """
    check("logits", logits, (None, None), wide_dtype(logits.dtype))
    check("targets", targets, (logits.shape[0], None), torch.int32, logits.device)
    _check_columns(targets, logits.shape[1])
    if inv_temperature is not None:
        check("inv_temperature", inv_temperature, (logits.shape[0],), torch.float32, logits.device)
    return SHARD_LOGPROB["statistics", logits](logits, targets, inv_temperature)


def fold_statistics(statistics: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Every shard's statistics, float64 [p, R, 3 + n] -> log-probabilities [R, n], entropy [R], stats [R, 2].

    The results are of `dtype`, which is that of the logits. Folded over the shards in their order, in float64, by the
    definitions of `logits_logprob`: a row with a NaN or +inf in any shard, or with nothing but -inf in all of them, has
    NaN for both. `stats` is what the gradient of a shard reads. A target that no shard has is -inf, like one that
    cannot be drawn. Raises InputError for another shape.
    """
    check("statistics", statistics, (None, None, None), torch.float64)
    if statistics.shape[0] < 1 or statistics.shape[2] < 3:
        raise InputError(f"statistics are {list(statistics.shape)}; they must be [shards, rows, 3 + targets of a row]")
    return SHARD_LOGPROB.chosen(dtype, statistics.device.type).functions["fold"](statistics, dtype)


def shard_logprob_backward(
    logits: Tensor,
    targets: Tensor,
    inv_temperature: Tensor | None,
    stats: Tensor,
    entropy: Tensor,
    d_logprobs: Tensor,
    d_entropy: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient with respect to this shard's logits, [R, V] in `dtype`; float32 logits may be written over.

    `targets` int32 [R], one per row, a column of this shard or -1; `stats` [R, 2] and `entropy` [R] as
    `fold_statistics` gave them; `d_logprobs` [R] and `d_entropy` [R] the gradients of the whole row's log-probability
    and entropy, which every shard gets alike. Raises InputError for what does not fit.
    """
    rows = logits.shape[0]
    check("logits", logits, (None, None), wide_dtype(logits.dtype))
    check("targets", targets, (rows,), torch.int32, logits.device)
    _check_columns(targets, logits.shape[1])
    check("stats", stats, (rows, 2), logits.dtype, logits.device)
    check("entropy", entropy, (rows,), logits.dtype, logits.device)
    check("d_logprobs", d_logprobs, (rows,), logits.dtype, logits.device)
    check("d_entropy", d_entropy, (rows,), logits.dtype, logits.device)
    if inv_temperature is not None:
        check("inv_temperature", inv_temperature, (rows,), torch.float32, logits.device)
    given = Upstream(targets, inv_temperature, stats, entropy, d_logprobs, d_entropy)
    return SHARD_LOGPROB["backward", logits](logits, given, dtype)


def _check_columns(targets: Tensor, columns: int) -> None:
    if targets.is_cpu and targets.numel() and not -1 <= int(targets.min()) <= int(targets.max()) < columns:
        wrong = ((targets < -1) | (targets >= columns)).nonzero()[0]
        raise InputError(
            f"target {int(targets[tuple(wrong)])} of row {int(wrong[0])} is outside the shard's {columns} columns; "
            "pass -1 for one in another shard"
        )


# ---- the definition, in torch ----


def _statistics_torch(logits: Tensor, targets: Tensor, inv_temperature: Tensor | None) -> Tensor:
    z = (logits if inv_temperature is None else logits * inv_temperature[:, None]).double()
    largest = z.amax(1, keepdim=True)
    below = z - torch.where(largest == -torch.inf, 0.0, largest)
    terms = below.exp()
    moment = torch.where(terms == 0, 0.0, terms * below).sum(1, keepdim=True)  # 0 * -inf must be 0
    chosen = z.gather(1, targets.clamp_min(0).long()).masked_fill(targets < 0, -torch.inf)
    return torch.cat([largest, terms.sum(1, keepdim=True), moment, chosen], 1)


def _fold_torch(statistics: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    largest, total, moment = statistics[:, :, 0], statistics[:, :, 1], statistics[:, :, 2]  # [p, R]
    whole = largest.amax(0)
    empty_shard = total == 0
    shift = torch.where(empty_shard, 0.0, largest - whole)
    scale = shift.exp()
    whole_total, whole_moment = torch.zeros_like(whole), torch.zeros_like(whole)
    for s in range(statistics.shape[0]):  # in this order, whatever torch's sum would do
        whole_total = whole_total + total[s] * scale[s]
        whole_moment = whole_moment + scale[s] * (moment[s] + total[s] * shift[s])
    log_total = torch.where(whole_total == 0, torch.nan, whole_total).log()
    logprobs = statistics[:, :, 3:].amax(0) - whole[:, None] - log_total[:, None]
    stats = torch.stack([whole, log_total], 1)
    return logprobs.to(dtype), (log_total - whole_moment / whole_total).to(dtype), stats.to(dtype)


def _backward_torch(logits: Tensor, given: Upstream, dtype: torch.dtype) -> Tensor:
    targets, inv_temperature, stats, entropy, d_logprobs, d_entropy = given
    scale = torch.ones_like(entropy) if inv_temperature is None else inv_temperature
    logp = (logits * scale[:, None] - stats[:, :1] - stats[:, 1:]).clamp_min(-200.0)  # -inf * 0 must be 0
    d_logits = -logp.exp() * (d_logprobs[:, None] + d_entropy[:, None] * (logp + entropy[:, None]))
    here = (targets >= 0).nonzero().flatten()
    d_logits[here, targets[here].long()] += d_logprobs[here]
    return (d_logits * scale[:, None]).to(dtype)


# ---- C++: csrc/cpu/shard_logprob.inl and token_logprob.inl ----


def _statistics_cpu(logits: Tensor, targets: Tensor, inv_temperature: Tensor | None) -> Tensor:
    (rows, columns), count = logits.shape, targets.shape[1]
    statistics = torch.empty((rows, 3 + count), dtype=torch.float64)
    inputs = [address(tensor) for tensor in (logits, targets, inv_temperature)]
    extension().shard_statistics(*inputs, address(statistics), rows, columns, count)
    return statistics


def _fold_cpu(statistics: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    shards, rows, count = statistics.shape[0], statistics.shape[1], statistics.shape[2] - 3
    outputs = torch.empty(rows, count), torch.empty(rows), torch.empty(rows, 2)
    extension().fold_statistics(address(statistics), *(address(tensor) for tensor in outputs), shards, rows, count)
    return outputs


SHARD_LOGPROB = Op(
    "shard_logprob",
    [
        cpu_backend({"statistics": _statistics_cpu, "fold": _fold_cpu, "backward": logits_gradient_cpu}, KERNEL_DTYPES),
        triton_backend("shard_logprob", "statistics", "fold", "backward", dtypes=TRITON_DTYPES),
        Backend(
            "torch",
            {"statistics": _statistics_torch, "fold": _fold_torch, "backward": _backward_torch},
            exact=False,  # torch does not promise one order of summation for every number of rows
        ),
    ],
)
