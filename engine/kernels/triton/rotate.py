"""Queries and keys normed, turned to their positions and rounded; keys and values written where attention reads them.

# T tokens, H query heads, K key/value heads, Dh head width
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.attention_call import AttentionCall
from engine.kernels.graph import empty
from engine.kernels.triton.attention_plan import DevicePlan
from engine.kernels.triton.launch import aligned, launch

_ROWS = 32  # (token, head) rows of a program: with 128 columns, 32 elements for each of 128 threads
E4M3_MAX = tl.constexpr(448.0)


def forward(call: AttentionCall, plan: DevicePlan) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [T, H, Dh] in qkv's dtype, and where keys and values are: the pages given, or new [T_kv, K, Dh].

    Rows of qkv and kv past the plan's are left alone, and of the plan's those past qkv's and kv's. In fp32 and in this
    order: mean of squares, 1 / sqrt(mean + eps), x times that, times the norm's weight, the rotation, one rounding.
    Keys and values go through `spec.kv_dtype` on their way where it is given, whether they end in pages or not.
    """
    qkv, spec, rope, _, keys, values, q_norm, k_norm, kv = call
    apart = kv is not None
    q_rows, kv_rows = aligned(qkv), aligned(kv if kv is not None else qkv)
    H, K, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    q = empty((qkv.shape[0], H, dim), qkv.dtype, qkv.device)
    e4m3 = spec.kv_dtype is not None
    page, strides = plan.page_size, (K * plan.page_size * dim, plan.page_size * dim, dim)
    k, v, k_page, k_strides = keys, values, page, strides
    if k is None or v is None or e4m3:
        k, v = (empty((kv_rows.shape[0], K, dim), qkv.dtype, qkv.device) for _ in range(2))
        k_page, k_strides = 0, (0, dim, K * dim)
    shape = {"DIM": dim, "HALF": triton.next_power_of_2(dim // 2), "ROWS": _ROWS}
    q_norm_data, k_norm_data = (None if norm is None else norm.data for norm in (q_norm, k_norm))
    launch(
        _write_queries, (triton.cdiv(qkv.shape[0] * H, _ROWS),), q_rows, q_rows.stride(0), q_norm_data, rope,
        plan.query_positions, plan.counts, qkv.shape[0], q, spec.eps, NUM_HEADS=H, **shape,
    )  # fmt: skip
    launch(
        _write_keys, (triton.cdiv(kv_rows.shape[0] * K, _ROWS),), kv_rows if apart else kv_rows[:, H * dim :],
        kv_rows.stride(0), k_norm_data, rope, plan.key_positions, plan.slots, plan.counts, kv_rows.shape[0], k, v,
        spec.eps, *k_strides, NUM_HEADS=K, PAGE=k_page, E4M3=e4m3, **shape,
    )  # fmt: skip
    if keys is None or values is None:
        return q, k, v
    if e4m3:
        # A kernel of its own: stores of one byte would have the rows of the other dealt to fewer threads, and their
        # sums would go another way than without pages.
        for rows, pages in ((k, keys), (v, values)):
            launch(
                _to_pages, (triton.cdiv(kv_rows.shape[0] * K, _ROWS),), rows, pages, plan.slots, plan.counts,
                kv_rows.shape[0], *strides, NUM_HEADS=K, PAGE=page, DIM=dim, PADDED=triton.next_power_of_2(dim),
                ROWS=_ROWS,
            )  # fmt: skip
    return q, keys, values


@triton.jit(do_not_specialize=["num_tokens"])
def _write_queries(
    x, row_stride, norm, rope, positions, counts, num_tokens, q, eps,
    NUM_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = row // NUM_HEADS, row % NUM_HEADS
    here = (token < tl.load(counts)) & (token < num_tokens)
    columns = tl.arange(0, HALF)
    inside = here[:, None] & (columns < DIM // 2)[None]
    at = x + (token.to(tl.int64) * row_stride + head * DIM)[:, None] + columns[None]
    x1, x2 = _turned(at, here, inside, norm, rope, positions + token, columns, eps, DIM)
    to = q + row.to(tl.int64)[:, None] * DIM + columns[None]
    tl.store(to, x1.to(q.dtype.element_ty), mask=inside)
    tl.store(to + DIM // 2, x2.to(q.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def _write_keys(
    x, row_stride, norm, rope, positions, slots, counts, num_tokens, keys, values, eps,
    page_stride, head_stride, slot_stride, NUM_HEADS: tl.constexpr, PAGE: tl.constexpr, E4M3: tl.constexpr,
    DIM: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = row // NUM_HEADS, row % NUM_HEADS
    here = (token < tl.load(counts + 1)) & (token < num_tokens)
    columns = tl.arange(0, HALF)
    inside = here[:, None] & (columns < DIM // 2)[None]
    at = x + (token.to(tl.int64) * row_stride + head * DIM)[:, None] + columns[None]
    x1, x2 = _turned(at, here, inside, norm, rope, positions + token, columns, eps, DIM)
    if PAGE:
        slot = tl.load(slots + token, mask=here, other=0)
        start = (slot // PAGE).to(tl.int64) * page_stride + slot % PAGE * slot_stride
    else:
        start = token.to(tl.int64) * slot_stride
    to = (start + head * head_stride)[:, None] + columns[None]
    _store(keys + to, x1.to(x.dtype.element_ty), inside, E4M3)
    _store(keys + to + DIM // 2, x2.to(x.dtype.element_ty), inside, E4M3)
    at += NUM_HEADS * DIM
    _store(values + to, tl.load(at, mask=inside, other=0.0), inside, E4M3)
    _store(values + to + DIM // 2, tl.load(at + DIM // 2, mask=inside, other=0.0), inside, E4M3)


@triton.jit(do_not_specialize=["num_tokens"])
def _to_pages(
    rows, pages, slots, counts, num_tokens, page_stride, head_stride, slot_stride,
    NUM_HEADS: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = row // NUM_HEADS, row % NUM_HEADS
    here = (token < tl.load(counts + 1)) & (token < num_tokens)
    columns = tl.arange(0, PADDED)
    inside = here[:, None] & (columns < DIM)[None]
    slot = tl.load(slots + token, mask=here, other=0)
    start = (slot // PAGE).to(tl.int64) * page_stride + slot % PAGE * slot_stride + head * head_stride
    x = tl.load(rows + row.to(tl.int64)[:, None] * DIM + columns[None], mask=inside, other=0.0)
    tl.store(pages + start[:, None] + columns[None], x.to(tl.float32).to(pages.dtype.element_ty), mask=inside)


@triton.jit
def _turned(at, here, inside, norm, rope, positions, columns, eps, DIM: tl.constexpr):
    """Both halves of the heads at `at`, fp32: normed where there is a norm, and turned."""
    x1 = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(at + DIM // 2, mask=inside, other=0.0).to(tl.float32)
    within = columns < DIM // 2
    if norm is not None:
        mean = (tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / DIM
        inverse = tl.rsqrt(mean + eps)[:, None]
        x1 = x1 * inverse * tl.load(norm + columns, mask=within, other=0.0).to(tl.float32)[None]
        x2 = x2 * inverse * tl.load(norm + DIM // 2 + columns, mask=within, other=0.0).to(tl.float32)[None]
    position = tl.load(positions, mask=here, other=0).to(tl.int64)
    table = rope + position[:, None] * DIM + columns[None]
    cos = tl.load(table, mask=inside, other=0.0)
    sin = tl.load(table + DIM // 2, mask=inside, other=0.0)
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin


@triton.jit
def _store(to, x, inside, E4M3: tl.constexpr):
    if E4M3:
        x = to_e4m3(x.to(tl.float32))
    tl.store(to, x.to(to.dtype.element_ty), mask=inside)


@triton.jit
def to_e4m3(x):
    """The value of float8_e4m3fn nearest to x, ties to even, at most 448; NaN stays. fp32 to fp32: what is stored is
    then exact in any type, whatever the conversion to it does with others."""
    near = tl.where(x > E4M3_MAX, E4M3_MAX, tl.where(x < -E4M3_MAX, -E4M3_MAX, x))
    exponent = tl.maximum((near.to(tl.int32, bitcast=True) >> 23) & 0xFF, 127 - 6)  # below 2**-6 steps stay as they are
    shift = (((exponent + 20) << 23) | 0x400000).to(tl.float32, bitcast=True)  # 1.5 * 2**23 steps of 2**(exponent - 3)
    return tl.where(x == x, (near + shift) - shift, x)
