"""THE softmax statistics of a row of logits on a GPU, for sampling and for training: equal logits give equal bits.

z = logit * inverse temperature. A row is read once, in tiles of 4,096 columns, each by a program of its own, so that a
single row too is read by many: m_t = max z, s_t = sum exp(z - m_t), w_t = sum exp(z - m_t) (z - m_t), in float32. With
M = max m_t, whoever needs the row folds its tiles in float64: total = sum s_t exp(m_t - M), log p(i) = z_i - M -
log(total). A NaN or +inf anywhere makes the total, and with it every log-probability of the row, NaN.

# R rows, V vocabulary
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.launch import launch

TILE: tl.constexpr = tl.constexpr(4096)


def tile_statistics(logits: Tensor, inv_temperature: Tensor | None, temperature: Tensor | None = None) -> Tensor:
    """m, s and w of every tile: float32 [R, V] -> float32 [R, tiles, 3].

    Of `inv_temperature` and `temperature`, float32 [R] both, at most one is given; a temperature of 0 counts as 1.
    """
    rows, vocab = logits.shape
    tiles = triton.cdiv(vocab, TILE.value)
    statistics = torch.empty((rows, tiles, 3), dtype=torch.float32, device=logits.device)
    launch(_tile_statistics, (rows, tiles), logits, inv_temperature, temperature, statistics, vocab)
    return statistics


def fold_width(statistics: Tensor) -> int:
    """The block in which a row's tiles are folded: a function of the vocabulary alone."""
    return triton.next_power_of_2(statistics.shape[1])


@triton.jit
def _tile_statistics(logits, inv_temperature, temperature, statistics, vocab):
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    scale = scale_of(inv_temperature, temperature, row)
    columns = tile * TILE + tl.arange(0, TILE)
    z = tl.load(logits + row * vocab + columns, mask=columns < vocab, other=float("-inf")) * scale
    largest = tl.max(z, axis=0)
    below = z - shift_of(largest)
    e = tl.exp(below)
    to = statistics + (row * tl.num_programs(1) + tile) * 3
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
def load_tiles(statistics, row, tiles, FOLD: tl.constexpr):
    """m, s and w of the row's tiles; past them no mass."""
    tile = tl.arange(0, FOLD)
    at = statistics + (row * tiles + tile) * 3
    largest = tl.load(at, mask=tile < tiles, other=float("-inf"))
    return largest, tl.load(at + 1, mask=tile < tiles, other=0.0), tl.load(at + 2, mask=tile < tiles, other=0.0)


@triton.jit
def fold(largest, sums, moments):
    """The row's maximum in float32; sum exp(z - max) and sum exp(z - max) (z - max) in float64.

    A row of nothing but -inf has a NaN total.
    """
    whole = tl.max(largest, axis=0)
    scale = tl.exp(largest - whole).to(tl.float64)
    wide = sums.to(tl.float64)
    total = tl.sum(wide * scale, axis=0)
    shift = largest.to(tl.float64) - whole.to(tl.float64)
    moment = tl.sum(tl.where(sums == 0.0, 0.0, scale * (moments.to(tl.float64) + wide * shift)), axis=0)
    return whole, total, moment
