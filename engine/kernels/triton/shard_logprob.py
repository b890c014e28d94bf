"""Log-probabilities over shards of the vocabulary on a GPU: a shard's statistics, and their fold in shard order.

# p shards, R rows, V columns of one shard, n targets of a row
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.launch import launch
from engine.kernels.triton.softmax_row import fold_width, load_tiles, row_statistics, scale_of
from engine.kernels.triton.token_logprob import backward as backward

_TARGETS = 16  # of a row at a time


def statistics(logits: Tensor, targets: Tensor, inv_temperature: Tensor | None) -> Tensor:
    """See `engine.kernels.shard_logprob.shard_statistics`. Any target outside the shard counts as another shard's."""
    (rows, columns), count = logits.shape, targets.shape[1]
    out = torch.empty((rows, 3 + count), dtype=torch.float64, device=logits.device)
    by_tile, by_row = row_statistics(logits, inv_temperature)
    inputs, sizes = (logits, targets, inv_temperature, by_tile, by_row, out), (columns, by_tile.shape[1], count)
    launch(_statistics, (rows,), *inputs, *sizes, FOLD=fold_width(by_tile), TARGETS=_TARGETS, num_warps=1)
    return out


def fold(statistics: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """See `engine.kernels.shard_logprob.fold_statistics`; `dtype` is float32."""
    shards, rows, count = statistics.shape[0], statistics.shape[1], statistics.shape[2] - 3
    logprobs, entropy, stats = (
        torch.empty(shape, dtype=dtype, device=statistics.device) for shape in ((rows, count), (rows,), (rows, 2))
    )
    outputs = (logprobs, entropy, stats)
    launch(_fold, (rows,), statistics, *outputs, shards, rows, count, TARGETS=_TARGETS, num_warps=1)
    return outputs


@triton.jit
def _statistics(
    logits, targets, inv_temperature, by_tile, by_row, out, columns, tiles, count,
    FOLD: tl.constexpr, TARGETS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scale = scale_of(inv_temperature, None, row)
    whole, total = tl.load(by_row + 4 * row), tl.load(by_row + 4 * row + 1)
    moment = tl.load(by_row + 4 * row + 2)
    if whole == float("-inf"):
        # Nothing but -inf, which is no mass (as a whole row it would be NaN), or a NaN, which its tile's sum kept.
        _, sums, _ = load_tiles(by_tile, row, tiles, FOLD)
        total = tl.sum(sums, axis=0).to(tl.float64)
        moment = total
    to = out + row * (3 + count)
    tl.store(to, whole)
    tl.store(to + 1, total)
    tl.store(to + 2, moment)
    for first in range(0, count, TARGETS):
        i = first + tl.arange(0, TARGETS)
        target = tl.load(targets + row * count + i, mask=i < count, other=-1)
        here = (target >= 0) & (target < columns)
        z = tl.load(logits + row * columns + target, mask=here, other=float("-inf")) * scale
        tl.store(to + 3 + i, z.to(tl.float64), mask=i < count)


@triton.jit(do_not_specialize=["rows"])  # a 1 would be a constant, which has no type to convert
def _fold(statistics, logprobs, entropy, stats, shards, rows, count, TARGETS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    width = 3 + count
    first_shard = statistics + row * width
    shard_size = rows.to(tl.int64) * width
    whole = tl.load(first_shard)
    for shard in range(1, shards):
        whole = tl.maximum(whole, tl.load(first_shard + shard * shard_size))
    total, moment = tl.zeros([], tl.float64), tl.zeros([], tl.float64)
    for shard in range(0, shards):
        at = first_shard + shard * shard_size
        its_total = tl.load(at + 1)
        shift = tl.where(its_total == 0.0, 0.0, tl.load(at) - whole)
        scale = tl.exp(shift)
        total += its_total * scale
        moment += scale * (tl.load(at + 2) + its_total * shift)
    log_total = tl.log(tl.where(total == 0.0, float("nan"), total))
    tl.store(entropy + row, (log_total - moment / total).to(tl.float32))
    tl.store(stats + 2 * row, whole.to(tl.float32))
    tl.store(stats + 2 * row + 1, log_total.to(tl.float32))
    for first in range(0, count, TARGETS):
        i = first + tl.arange(0, TARGETS)
        z = tl.full([TARGETS], float("-inf"), tl.float64)
        for shard in range(0, shards):
            at = first_shard + shard * shard_size + 3 + i
            z = tl.maximum(z, tl.load(at, mask=i < count, other=float("-inf")))
        tl.store(logprobs + row * count + i, ((z - whole) - log_total).to(tl.float32), mask=i < count)
