"""Queries and keys normed, turned to their positions and rounded; keys and values written where attention reads them.

# T tokens, H query heads, K key/value heads, Dh head width
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.attention_pages import AttentionSpec
from engine.kernels.graph import empty
from engine.kernels.triton.attention_plan import DevicePlan
from engine.kernels.triton.launch import launch
from engine.kernels.weight import Weight

_HEADS = 8  # heads of a program: with 128 columns, 8 elements for each of 128 threads
E4M3_MAX = tl.constexpr(448.0)


def forward(
    qkv: Tensor,
    kv: Tensor | None,
    spec: AttentionSpec,
    rope: Tensor,
    plan: DevicePlan,
    keys: Tensor | None,
    values: Tensor | None,
    q_norm: Weight | None,
    k_norm: Weight | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [T, H, Dh] in qkv's dtype, and where keys and values are: the pages given, or new [T_kv, K, Dh].

    Rows of qkv and kv past the plan's are left alone. fp32 throughout, in this order: mean of squares, 1 / sqrt(mean +
    eps), x times that, times the norm's weight, then the rotation, then one rounding. Keys and values go through
    `spec.kv_dtype` on their way where it is given, whether they end in pages or not.
    """
    apart = kv is not None
    q_rows, kv_rows = aligned(qkv), aligned(kv if kv is not None else qkv)
    H, K, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    q = empty((qkv.shape[0], H, dim), qkv.dtype, qkv.device)
    if keys is None or values is None:
        keys = empty((kv_rows.shape[0], K, dim), qkv.dtype, qkv.device)
        values = empty((kv_rows.shape[0], K, dim), qkv.dtype, qkv.device)
        page, strides = 0, (0, dim, K * dim)
    else:
        page = plan.page_size
        strides = (K * page * dim, page * dim, dim)
    shape = {"DIM": dim, "HALF": triton.next_power_of_2(dim // 2), "HEADS": _HEADS}
    norms = (None if norm is None else norm.data for norm in (q_norm, k_norm))
    q_norm_data, k_norm_data = norms
    launch(
        _write_queries, (qkv.shape[0], triton.cdiv(H, _HEADS)), q_rows, q_rows.stride(0), q_norm_data, rope,
        plan.query_positions, plan.counts, q, H, spec.eps, **shape,
    )  # fmt: skip
    launch(
        _write_keys, (kv_rows.shape[0], triton.cdiv(K, _HEADS)), kv_rows if apart else kv_rows[:, H * dim :],
        kv_rows.stride(0), k_norm_data, rope, plan.key_positions, plan.slots, plan.counts, keys, values, K, spec.eps,
        *strides, PAGE=page, E4M3=spec.kv_dtype is not None, **shape,
    )  # fmt: skip
    return q, keys, values


def aligned(x: Tensor) -> Tensor:
    """`x`, or a copy of it where its rows do not start at multiples of 16 bytes: how wide the loads are decides the
    order of a row's sum, so it must not depend on where a tensor happens to lie."""
    return x if x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 else x.clone().contiguous()


@triton.jit
def _write_queries(
    x, row_stride, norm, rope, positions, counts, q, num_heads, eps,
    DIM: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(counts):
        heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
        columns = tl.arange(0, HALF)
        inside = (heads < num_heads)[:, None] & (columns < DIM // 2)[None]
        at = heads[:, None] * DIM + columns[None]
        position = tl.load(positions + row).to(tl.int64)
        x1, x2 = _turned(x + row * row_stride + at, inside, norm, rope + position * DIM, columns, eps, DIM)
        to = q + row * num_heads * DIM + at
        tl.store(to, x1.to(q.dtype.element_ty), mask=inside)
        tl.store(to + DIM // 2, x2.to(q.dtype.element_ty), mask=inside)


@triton.jit
def _write_keys(
    x, row_stride, norm, rope, positions, slots, counts, keys, values, num_heads, eps, page_stride, head_stride,
    slot_stride, PAGE: tl.constexpr, E4M3: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(counts + 1):
        heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
        columns = tl.arange(0, HALF)
        inside = (heads < num_heads)[:, None] & (columns < DIM // 2)[None]
        at = heads[:, None] * DIM + columns[None]
        position = tl.load(positions + row).to(tl.int64)
        row_at = x + row * row_stride + at
        x1, x2 = _turned(row_at, inside, norm, rope + position * DIM, columns, eps, DIM)
        if PAGE:
            slot = tl.load(slots + row).to(tl.int64)
            start = slot // PAGE * page_stride + slot % PAGE * slot_stride
        else:
            start = row * slot_stride
        to = start + heads[:, None] * head_stride + columns[None]
        _store(keys + to, x1.to(x.dtype.element_ty), inside, E4M3)
        _store(keys + to + DIM // 2, x2.to(x.dtype.element_ty), inside, E4M3)
        row_at += num_heads * DIM
        _store(values + to, tl.load(row_at, mask=inside, other=0.0), inside, E4M3)
        _store(values + to + DIM // 2, tl.load(row_at + DIM // 2, mask=inside, other=0.0), inside, E4M3)


@triton.jit
def _turned(at, inside, norm, table, columns, eps, DIM: tl.constexpr):
    """Both halves of the heads at `at`, fp32: normed where there is a norm, and turned."""
    x1 = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(at + DIM // 2, mask=inside, other=0.0).to(tl.float32)
    within = columns < DIM // 2
    if norm is not None:
        mean = (tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / DIM
        inverse = tl.rsqrt(mean + eps)[:, None]
        x1 = x1 * inverse * tl.load(norm + columns, mask=within, other=0.0).to(tl.float32)[None]
        x2 = x2 * inverse * tl.load(norm + DIM // 2 + columns, mask=within, other=0.0).to(tl.float32)[None]
    cos = tl.load(table + columns, mask=within, other=0.0)[None]
    sin = tl.load(table + DIM // 2 + columns, mask=within, other=0.0)[None]
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin


@triton.jit
def _store(to, x, inside, E4M3: tl.constexpr):
    if E4M3:
        wide = x.to(tl.float32)
        wide = tl.where(wide > E4M3_MAX, E4M3_MAX, tl.where(wide < -E4M3_MAX, -E4M3_MAX, wide))  # NaN stays
        tl.store(to, wide.to(tl.float8e4nv).to(to.dtype.element_ty), mask=inside)
    else:
        tl.store(to, x, mask=inside)
