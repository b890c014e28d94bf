"""THE softmax statistics of a row of logits on a GPU, for sampling and for training: equal logits give equal bits.

z = logit * inverse temperature. A row is read once, in tiles of 4,096 columns, each by a program of its own, so that a
single row too is read by many: m_t = max z, s_t = sum exp(z - m_t), w_t = sum exp(z - m_t) (z - m_t), in float32. With
M = max m_t its tiles are folded in float64: total = sum s_t exp(m_t - M), log p(i) = (z_i - M) - log(total). A NaN or
+inf anywhere makes the total, and with it every log-probability of the row, NaN.

Both sums depend on how a kernel deals elements to threads. So these two kernels, with these numbers of warps, make them
for every op, and what an op does with them is arithmetic on single numbers.

# R rows, V vocabulary
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.launch import aligned, launch

TILE: tl.constexpr = tl.constexpr(4096)


def row_statistics(
    logits: Tensor, inv_temperature: Tensor | None, temperature: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Of float32 [R, V]: m, s and w of each tile, float32 [R, tiles, 3], and of each row max z, total, sum exp(z - max)
    (z - max) and log(total), float64 [R, 4].

    Of `inv_temperature` and `temperature`, float32 [R] both, at most one is given; a temperature of 0 counts as 1. A
    row of nothing but -inf has a NaN total.
    """
    logits = aligned(logits)
    rows, vocab = logits.shape
    tiles = triton.cdiv(vocab, TILE.value)
    by_tile = torch.empty((rows, tiles, 3), dtype=torch.float32, device=logits.device)
    by_row = torch.empty((rows, 4), dtype=torch.float64, device=logits.device)
    launch(_tile_statistics, (rows, tiles), logits, inv_temperature, temperature, by_tile, vocab)
    launch(_fold, (rows,), by_tile, by_row, tiles, FOLD=fold_width(by_tile), num_warps=1)
    return by_tile, by_row


def fold_width(by_tile: Tensor) -> int:
    """The block that holds a row's tiles: a function of the vocabulary alone."""
    return triton.next_power_of_2(by_tile.shape[1])


@triton.jit
def _tile_statistics(logits, inv_temperature, temperature, by_tile, vocab):
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    scale = scale_of(inv_temperature, temperature, row)
    columns = tile * TILE + tl.arange(0, TILE)
    z = tl.load(logits + row * vocab + columns, mask=columns < vocab, other=float("-inf")) * scale
    largest = tl.max(z, axis=0)
    below = z - shift_of(largest)
    e = tl.exp(below)
    to = by_tile + (row * tl.num_programs(1) + tile) * 3
    tl.store(to, largest)
    tl.store(to + 1, tl.sum(e, axis=0))
    tl.store(to + 2, tl.sum(e * tl.maximum(below, -100.0), axis=0))  # exp(-100) is 0 in effect: 0 * -inf must be 0


@triton.jit
def scale_of(inv_temperature, temperature, row):
    """What the row's logits are multiplied by. Divided as torch does on the host: both are rounded correctly."""
    if inv_temperature is not None:
        return tl.load(inv_temperature + row)
    elif temperature is not None:
        heat = tl.load(temperature + row)
        return tl.div_rn(1.0, tl.where(heat == 0.0, 1.0, heat))
    else:
        return 1.0


@triton.jit
def shift_of(largest):
    """What exponents are taken against: a tile that holds nothing but -inf must not become NaN."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def load_tiles(by_tile, row, tiles, FOLD: tl.constexpr):
    """m, s and w of the row's tiles; past them no mass."""
    tile = tl.arange(0, FOLD)
    at = by_tile + (row * tiles + tile) * 3
    largest = tl.load(at, mask=tile < tiles, other=float("-inf"))
    return largest, tl.load(at + 1, mask=tile < tiles, other=0.0), tl.load(at + 2, mask=tile < tiles, other=0.0)


@triton.jit
def _fold(by_tile, by_row, tiles, FOLD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest, sums, moments = load_tiles(by_tile, row, tiles, FOLD)
    whole = tl.max(largest, axis=0)
    scale = tl.exp(largest - whole).to(tl.float64)
    wide = sums.to(tl.float64)
    total = tl.sum(wide * scale, axis=0)
    shift = largest.to(tl.float64) - whole.to(tl.float64)
    moment = tl.sum(tl.where(sums == 0.0, 0.0, scale * (moments.to(tl.float64) + wide * shift)), axis=0)
    to = by_row + 4 * row
    tl.store(to, whole.to(tl.float64))
    tl.store(to + 1, total)
    tl.store(to + 2, moment)
    tl.store(to + 3, tl.log(total))


@triton.jit
def logprob_of(z, whole, log_total):
    """Log-probability of a token whose scaled logit is z, float32; `whole` and `log_total` are the row's, float64."""
    return ((z.to(tl.float64) - whole) - log_total).to(tl.float32)
