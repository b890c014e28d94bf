"""The head with its vocabulary dealt over tensor-parallel ranks: log-probabilities and tokens without all logits on
one rank.

Each rank reduces its columns to a few numbers a row (`shard_statistics`), these travel, and every rank folds them in
rank order, so sampling and training get the same bits. To draw tokens, rows are dealt: rank i gets all columns of its
share of the rows.

# T tokens, R rows of logits, V vocabulary, Vl = columns of this rank, p ranks, n targets of a row
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.kernels.dtypes import wide_dtype
from engine.kernels.graph import empty
from engine.kernels.linear import linear, linear_grad_input, linear_grad_weight_
from engine.kernels.sample_token import sample_token, top_logprobs
from engine.kernels.shard_logprob import (
    fold_statistics,
    shard_logprob_backward,
    shard_statistics,
    shard_targets,
)
from engine.kernels.token_logprob import logits_rows, row_chunks, token_logprob
from engine.kernels.weight import Weight
from engine.parallel.collectives import Group, all_gather, all_to_all
from engine.parallel.shards import row_shard


def vocabulary_logprob(
    hidden: Tensor, head: Weight, targets: Tensor, inv_temperature: Tensor | None, first: int, group: Group
) -> tuple[Tensor, Tensor]:
    """`token_logprob` for a head of which this rank holds the columns from `first` on: [T, D], int32 [T] -> log p [T]
    and entropy [T], the same on every rank. The gradient of `hidden` is this rank's part; `all_rows` sums it."""
    if group.size == 1:
        return token_logprob(hidden, head, targets, inv_temperature)
    if torch.is_grad_enabled() and hidden.requires_grad:
        return _VocabularyLogprob.apply(hidden, head, targets, inv_temperature, first, group)
    logprobs, entropy, _ = _forward(hidden, head, targets, inv_temperature, first, group)
    return logprobs, entropy


def vocabulary_sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    counter: Tensor,
    vocab_size: int,
    group: Group,
) -> tuple[Tensor, Tensor, Tensor]:
    """`sample_token` from this rank's columns [R, Vl] of the logits: the same tokens on every rank, and the tokens that
    one rank with all columns would draw."""
    settings = (temperature, top_k, top_p, min_p, seed, counter)
    if group.size == 1:
        return sample_token(logits, *settings)
    rows = logits.shape[0]
    share = -(-rows // group.size)
    mine = slice(share * group.index, min(rows, share * (group.index + 1)))
    whole = _deal_rows(logits, share, vocab_size, group)[: max(0, mine.stop - mine.start)]
    drawn = torch.zeros((share, 2), dtype=torch.int32, device=logits.device)
    if len(whole):
        tokens, _, kept_mass = sample_token(whole, *(setting[mine].contiguous() for setting in settings))
        drawn[: len(whole), 0], drawn[: len(whole), 1] = tokens, kept_mass.view(torch.int32)
    everyone = all_gather(drawn, group).flatten(0, 1)[:rows]
    tokens, kept_mass = everyone[:, 0].contiguous(), everyone[:, 1].contiguous().view(torch.float32)
    inverse = torch.where(temperature > 0, 1 / temperature, 1.0)
    logprobs = _logprobs_of(logits, tokens.clamp_min(0)[:, None], inverse, vocab_size, group)[:, 0]
    return tokens, torch.where(tokens < 0, torch.nan, logprobs), kept_mass


def vocabulary_top(
    logits: Tensor, k: int, inv_temperature: Tensor, vocab_size: int, group: Group
) -> tuple[Tensor, Tensor]:
    """`top_logprobs` from this rank's columns: [R, Vl] -> ids int32 and log-probabilities [R, k]."""
    if group.size == 1:
        return top_logprobs(logits, k, inv_temperature)
    whole = _deal_rows(logits.repeat(group.size, 1), logits.shape[0], vocab_size, group)  # all rows to every rank
    ids = top_logprobs(whole, k, inv_temperature)[0]
    return ids, _logprobs_of(logits, ids, inv_temperature, vocab_size, group)


class _VocabularyLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Weight,
        targets: Tensor,
        inv_temperature: Tensor | None,
        first: int,
        group: Group,
    ) -> tuple[Tensor, Tensor]:
        ctx.head, ctx.first = head, first
        ctx.set_materialize_grads(False)
        logprobs, entropy, stats = _forward(hidden, head, targets, inv_temperature, first, group)
        ctx.save_for_backward(hidden, targets, inv_temperature, stats, entropy)
        return logprobs, entropy

    @staticmethod
    def backward(
        ctx: Any, d_logprobs: Tensor | None, d_entropy: Tensor | None
    ) -> tuple[Tensor, None, None, None, None, None]:  # type: ignore[override]
        hidden, targets, inv_temperature, stats, entropy = ctx.saved_tensors
        head = ctx.head
        zeros = torch.zeros_like(entropy)
        d_logprobs = zeros if d_logprobs is None else d_logprobs.contiguous()
        d_entropy = zeros if d_entropy is None else d_entropy.contiguous()
        here = shard_targets(targets, ctx.first, head.shape[0])
        d_hidden = empty(tuple(hidden.shape), hidden.dtype, hidden.device)
        for part in _chunks(hidden.shape[0], head):
            x, inverse = hidden[part], None if inv_temperature is None else inv_temperature[part]
            logits = _logits(x, head)  # [c, Vl]
            d_logits = shard_logprob_backward(
                logits, here[part], inverse, stats[part], entropy[part], d_logprobs[part], d_entropy[part], x.dtype
            )
            d_hidden[part] = linear_grad_input(d_logits, head)  # [c, Vl] -> [c, D]
            linear_grad_weight_(d_logits, x, head)
        return d_hidden, None, None, None, None, None


def _forward(
    hidden: Tensor, head: Weight, targets: Tensor, inv_temperature: Tensor | None, first: int, group: Group
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [T], entropy [T] and what the backward needs [T, 2]; one exchange for all chunks."""
    here = shard_targets(targets, first, head.shape[0])
    statistics = [hidden.new_empty((0, 4), dtype=torch.float64)]  # a rank may have no rows
    for part in _chunks(hidden.shape[0], head):
        inverse = None if inv_temperature is None else inv_temperature[part]
        statistics.append(shard_statistics(_logits(hidden[part].detach(), head), here[part, None], inverse))
    logprobs, entropy, stats = fold_statistics(all_gather(torch.cat(statistics), group), wide_dtype(hidden.dtype))
    return logprobs[:, 0], entropy, stats


def _logprobs_of(logits: Tensor, ids: Tensor, inverse: Tensor, vocab_size: int, group: Group) -> Tensor:
    """Log-probabilities of ids [R, n] from this rank's columns: [R, n]."""
    here = shard_targets(ids, row_shard(vocab_size, group.size, group.index).first, logits.shape[1])
    return fold_statistics(all_gather(shard_statistics(logits, here, inverse), group))[0]


def _deal_rows(logits: Tensor, share: int, vocab_size: int, group: Group) -> Tensor:
    """All columns of this rank's share of the rows: [R, Vl] -> [share, V]."""
    widths = [row_shard(vocab_size, group.size, index).size for index in range(group.size)]
    padded = torch.nn.functional.pad(logits, (0, 0, 0, share * group.size - logits.shape[0]))
    sizes = [share * logits.shape[1]] * group.size
    flat = all_to_all(padded.reshape(-1), group, sizes, [share * width for width in widths])
    pieces = flat.split([share * width for width in widths])
    return torch.cat([piece.view(share, -1) for piece in pieces], 1)


def _logits(x: Tensor, head: Weight) -> Tensor:
    return linear(x, head, out_dtype=wide_dtype(x.dtype))


def _chunks(rows: int, head: Weight) -> list[slice]:
    return row_chunks(rows, logits_rows(head.shape[0], head.data.device))
