"""Back through RoPE and the q/k norm on a GPU: what the epilogues of attention's backward do with a tile of gradients.

# R rows of a tile, Dh head width
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def head_columns(DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Which element of a head each column of a tile holds, and whether it holds one: both halves of a head that is no
    power of two wide are padded alike, so that the halves of a tile are the halves of a head."""
    column = tl.arange(0, BLOCK)
    if DIM == BLOCK:
        return column, column < DIM
    within = column % (BLOCK // 2)
    return column // (BLOCK // 2) * (DIM // 2) + within, within < DIM // 2


@triton.jit
def turn_back(
    gradient, x, turn, norm, to, norm_sums, program, valid, eps,
    DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of R heads before norm and RoPE from that after them, fp32 [R, BLOCK] as head_columns has it.

    x, to: [R] pointers to heads before them, and to their gradients; turn: [R] pointers to cos and sin. Where `norm` is
    not None, row `program` of norm_sums is set to the gradient of the norm's weight from these rows.
    """
    HALF: tl.constexpr = DIM // 2
    column = tl.arange(0, BLOCK // 2)
    inside = valid[:, None]
    if BLOCK // 2 > HALF:
        inside = inside & (column < HALF)[None, :]
    first, second = tl.split(tl.permute(tl.reshape(gradient, (gradient.shape[0], 2, BLOCK // 2)), (0, 2, 1)))
    cos = tl.load(turn[:, None] + column[None, :], mask=inside, other=0.0)
    sin = tl.load(turn[:, None] + (HALF + column)[None, :], mask=inside, other=0.0)
    d_first = tl.fma(first, cos, second * sin)
    d_second = tl.fma(second, cos, -(first * sin))
    if norm is not None:
        x_first = tl.load(x[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        x_second = tl.load(x[:, None] + (HALF + column)[None, :], mask=inside, other=0.0).to(tl.float32)
        squares = tl.sum(tl.fma(x_first, x_first, x_second * x_second), 1)
        inverse = (1.0 / tl.sqrt_rn(squares / DIM + eps))[:, None]
        x_first *= inverse
        x_second *= inverse
        within = column < HALF
        norm_sums += tl.cast(program, tl.int64) * DIM
        tl.store(norm_sums + column, tl.sum(d_first * x_first, 0), mask=within)
        tl.store(norm_sums + HALF + column, tl.sum(d_second * x_second, 0), mask=within)
        d_first *= tl.load(norm + column, mask=within, other=0.0).to(tl.float32)[None, :]
        d_second *= tl.load(norm + HALF + column, mask=within, other=0.0).to(tl.float32)[None, :]
        mean = (tl.sum(tl.fma(d_first, x_first, d_second * x_second), 1) / DIM)[:, None]
        d_first = inverse * (d_first - x_first * mean)
        d_second = inverse * (d_second - x_second * mean)
    tl.store(to[:, None] + column[None, :], d_first.to(to.dtype.element_ty), mask=inside)
    tl.store(to[:, None] + (HALF + column)[None, :], d_second.to(to.dtype.element_ty), mask=inside)
