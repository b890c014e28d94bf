"""Back through RoPE and the q/k norm on a GPU: a kernel of its own, and what the epilogues of attention's backward do.

# T tokens, R rows of a tile, Dh head width
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.graph import empty
from engine.kernels.triton.column_sum import add_column_sums_
from engine.kernels.triton.launch import launch
from engine.kernels.weight import Weight

_TOKENS = 16  # of a program


def backward(gradient: Tensor, x: Tensor, d_x: Tensor, positions: Tensor, rope: Tensor, norm: Weight | None,
             eps: float) -> None:  # fmt: skip
    """Writes to d_x the gradient of the heads in x from that of these heads normed and turned, fp32 [T, heads, Dh].

    Rows of x and d_x begin with the heads, T of them or more, and may lie apart. Adds the norm's gradient to `norm`'s.
    """
    tokens, heads, dim = gradient.shape
    programs = triton.cdiv(tokens, _TOKENS), heads
    sums = norm_sums(programs, norm, gradient)
    launch(
        _backward, programs, gradient, x, positions, rope, None if norm is None else norm.data, d_x, sums, tokens,
        x.stride(0), d_x.stride(0), eps, HEADS=heads, DIM=dim, BLOCK=triton.next_power_of_2(dim), TOKENS=_TOKENS,
    )  # fmt: skip
    add_norm_gradient(sums, norm)


def norm_sums(programs: tuple[int, int], norm: Weight | None, like: Tensor) -> Tensor | None:
    """Room for what each program adds to the gradient of `norm`."""
    if norm is None:
        return None
    return empty((programs[0] * programs[1], norm.shape[0]), torch.float32, like.device)


def add_norm_gradient(sums: Tensor | None, norm: Weight | None) -> None:
    """Adds what all programs found."""
    if norm is not None and sums is not None:
        add_column_sums_(sums, norm.grad_buffer())


@triton.jit
def _backward(
    gradient, x, positions, rope, norm, d_x, sums, num_tokens, x_row, d_x_row, eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    valid = tokens < num_tokens
    wide = tokens.to(tl.int64)
    column = tl.arange(0, BLOCK // 2)
    at = gradient + (wide * HEADS + head)[:, None] * DIM + column[None, :]
    inside = valid[:, None] & (column < DIM // 2)[None, :]
    first = tl.load(at, mask=inside, other=0.0)
    second = tl.load(at + DIM // 2, mask=inside, other=0.0)
    position = tl.load(positions + tokens, mask=valid, other=0).to(tl.int64)
    turn_back(first, second, x + wide * x_row + head * DIM, rope + position * DIM, norm,
              d_x + wide * d_x_row + head * DIM, sums, tl.program_id(0) * HEADS + head, valid, eps, DIM,
              BLOCK)  # fmt: skip


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
def halves(tile, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Left and right half of a tile [ROWS, BLOCK]."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, BLOCK // 2)), (0, 2, 1)))


@triton.jit
def turn_back(
    first, second, x, turn, norm, to, norm_sums, program, valid, eps,
    DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of R heads before norm and RoPE from that after them, fp32 halves [R, BLOCK / 2].

    x, to: [R] pointers to heads before them, and to their gradients; turn: [R] pointers to cos and sin. Where `norm` is
    not None, row `program` of norm_sums is set to the gradient of the norm's weight from these rows.
    """
    HALF: tl.constexpr = DIM // 2
    column = tl.arange(0, BLOCK // 2)
    inside = valid[:, None]
    if BLOCK // 2 > HALF:
        inside = inside & (column < HALF)[None, :]
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
