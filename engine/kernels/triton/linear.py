"""The linear layer on a GPU: one matmul kernel for the output and for the gradients of input and weight.

Row invariance: an element of the output is acc = 0, then acc += a tile of x times a tile of W for each tile of K, in
order, and no sum over K is shared among programs. A tile has 64 rows at least, for a single row too, so that on Hopper
the instruction is always wgmma: mma.sync, that of 16 rows, may add its products in another order. The number of rows
chooses how many rows and columns a program computes side by side; that this does not enter an element's own sum is
what the tests of row invariance have to confirm on each kind of GPU, and where they fail all must have one tile.

# T tokens, N columns of the output, K width of the input; a kernel sees [M, depth] times [depth, N]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.graph import empty
from engine.kernels.triton.column_sum import add_column_sums_
from engine.kernels.triton.launch import gpu_of, launch
from engine.kernels.weight import Weight

_PROGRAMS = 256  # about two for each multiprocessor of the GPUs this is for


@dataclass(frozen=True)
class _Tiles:
    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# The biggest that leaves enough programs is taken: 128 x 256 for training, 64 x 32 for a decode step through 4,096
# columns. The depth is one, for it says where sums are cut. 128 x 256 reads a quarter less from the cache for each
# product than 128 x 128 does, and wants 144 KB of shared memory, and all registers: there are none left to add to a sum
# that lies in memory.
_DEPTH = 64
_WIDE_TILE = _Tiles(128, 256, _DEPTH, 8, 3)
_HALF_TILES = (_Tiles(128, 128, _DEPTH, 8, 3), _Tiles(64, 64, _DEPTH, 4, 6), _Tiles(64, 32, _DEPTH, 4, 8))
# No tensor core multiplies float32 without rounding it first: these are plain fused multiply-adds.
_FLOAT_TILES = _Tiles(64, 64, 16, 8, 3)


def forward(x: Tensor, weight: Weight, bias: Weight | None, out_dtype: torch.dtype) -> Tensor:
    """See `engine.kernels.linear.linear`."""
    rows, columns = x.shape[0], weight.shape[0]
    y = empty((rows, columns), out_dtype, x.device)
    _matmul(x, weight.data.t(), y, bias=None if bias is None else bias.data)  # [T, K] [K, N]
    return y


def grad_input(dy: Tensor, weight: Weight) -> Tensor:
    """dx = dy W."""
    dx = empty((dy.shape[0], weight.shape[1]), weight.dtype, dy.device)
    _matmul(dy, weight.data, dx)  # [T, N] [N, K]
    return dx


def grad_weight_(dy: Tensor, x: Tensor, weight: Weight) -> None:
    """The gradient += dy^T x: this call's tokens are summed in order, and the sum is added once."""
    if dy.shape[0]:
        _matmul(dy.t(), x, weight.grad_buffer(), add=True)  # [N, T] [T, K]


def grad_bias_(dy: Tensor, bias: Weight) -> None:
    """The gradient += the sum of dy's rows."""
    add_column_sums_(dy, bias.grad_buffer())


def _matmul(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None, add: bool = False) -> None:
    (rows, depth), columns = a.shape, b.shape[1]
    tiles = (
        _FLOAT_TILES
        if a.dtype == torch.float32
        else _half_tiles(rows, columns, wide=not add and gpu_of(a.device)[1] in (9, 10))
    )
    grid = (triton.cdiv(rows, tiles.rows) * triton.cdiv(columns, tiles.columns),)
    launch(
        _multiply, grid, a, b, bias, out, rows, columns, depth, *a.stride(), *b.stride(),
        ADD=add, WHOLE=depth % tiles.depth == 0, ROWS=tiles.rows, COLUMNS=tiles.columns, DEPTH=tiles.depth, GROUP=8,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip


def _half_tiles(rows: int, columns: int, wide: bool) -> _Tiles:
    for tiles in (_WIDE_TILE, *_HALF_TILES) if wide else _HALF_TILES:
        half_empty = rows <= tiles.rows // 2 and tiles.rows > 64
        if not half_empty and triton.cdiv(rows, tiles.rows) * triton.cdiv(columns, tiles.columns) >= _PROGRAMS:
            return tiles
    return _HALF_TILES[-1]


@triton.jit
def _multiply(
    a, b, bias, out, rows, columns, depth, a_row, a_depth, b_depth, b_column,
    ADD: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """out = a b + bias, or out += a b. Programs go down GROUP row tiles before they go to the next column tile, so that
    those that run together share tiles of both operands in the cache."""
    tl.assume(depth > 0)  # a sum that might have no terms makes ptxas wait after each instruction of a tile (C7515)
    row_tiles, column_tiles = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    group = tl.program_id(0) // (GROUP * column_tiles)
    in_group = tl.program_id(0) % (GROUP * column_tiles)
    group_rows = min(row_tiles - group * GROUP, GROUP)
    row = (group * GROUP + in_group % group_rows) * ROWS + tl.arange(0, ROWS)
    column = (in_group // group_rows) * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, column_inside = row < rows, column < columns
    k = tl.arange(0, DEPTH)
    a_at = a + row.to(tl.int64)[:, None] * a_row + k[None, :] * a_depth
    b_at = b + k[:, None] * b_depth + column.to(tl.int64)[None, :] * b_column
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, depth, DEPTH):
        if WHOLE:
            x = tl.load(a_at, mask=row_inside[:, None], other=0.0)
            w = tl.load(b_at, mask=column_inside[None, :], other=0.0)
        else:
            left = k < depth - first
            x = tl.load(a_at, mask=row_inside[:, None] & left[None, :], other=0.0)
            w = tl.load(b_at, mask=left[:, None] & column_inside[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        a_at += DEPTH * a_depth
        b_at += DEPTH * b_depth
    to = out + row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = row_inside[:, None] & column_inside[None, :]
    if bias is not None:
        acc += tl.load(bias + column, mask=column_inside, other=0.0).to(tl.float32)[None, :]
    if ADD:
        acc += tl.load(to, mask=inside, other=0.0)
    tl.store(to, acc.to(out.dtype.element_ty), mask=inside)
