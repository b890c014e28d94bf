"""Attention's backward on Hopper: the plain one, with the walks of `attention_gradients` in place of its own."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from engine.kernels.attention_call import AttentionCall
from engine.kernels.attention_pages import AttentionSpec
from engine.kernels.graph import empty
from engine.kernels.hopper.attention_gradients import grad_keys, grad_queries, row_statistics
from engine.kernels.hopper.gluon import tensor_map
from engine.kernels.triton import attention_backward as plain
from engine.kernels.triton.attention_backward_work import Tiles
from engine.kernels.triton.attention_plan import DevicePlan
from engine.kernels.triton.launch import aligned, gpu_of, launch

_STAGES = 4
_KEY_ROWS = 64  # of a step of grad_keys
_STATISTICS_ROWS = 32  # of a program


def serves(spec: AttentionSpec, dtype: torch.dtype) -> bool:
    """Whether these kernels do attention of this shape: heads of 64 or 128 in 16 bits. A token has a power of 2 of
    rows; where more than a quarter of them are no head's, the plain kernels waste less."""
    group = spec.num_heads // spec.num_kv_heads
    padded = triton.next_power_of_2(group)
    return dtype.itemsize == 2 and spec.head_dim in (64, 128) and padded <= 64 and 4 * group >= 3 * padded


def tiles_for(spec: AttentionSpec) -> Tiles:
    """Two warpgroups of 64 rows or keys. Steps of 128 keys leave heads of 128 no registers."""
    padded = triton.next_power_of_2(spec.num_heads // spec.num_kv_heads)
    keys = 128 if spec.head_dim == 64 else 64
    return Tiles(128, keys, 128, _KEY_ROWS, 4, _STAGES, apart=True, token_rows=padded)


def backward(
    call: AttentionCall,
    d_out: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """See `engine.kernels.triton.attention_backward.backward`, which serves shapes that these kernels do not."""
    arguments = call, aligned(d_out), out, lse
    if not serves(call.spec, call.qkv.dtype):
        return plain.backward(*arguments)
    return plain.backward(*arguments, tiles=tiles_for(call.spec), walks=_walks)


def _walks(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, out: Tensor, lse: Tensor, turned_q: Tensor,
           turned_k: Tensor, d_values: Tensor, spec: AttentionSpec, plan: DevicePlan, query_work: Tensor,
           key_work: Tensor) -> None:  # fmt: skip
    heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    if len(q) == 0 or len(k) == 0:  # a copy is described by what is there
        turned_k.zero_()
        d_values[: plan.num_keys].zero_()
        return
    group, tiles = heads // kv_heads, tiles_for(spec)
    padded = tiles.token_rows
    pitch = triton.cdiv(len(q) * padded, 16) * 16  # of the rows of `statistics`, which copies want to start at 16 bytes
    statistics = empty((4 * kv_heads, pitch), torch.float32, q.device)
    num_rows = plan.num_tokens * kv_heads * padded
    shape = {"KV_HEADS": kv_heads, "GROUP": group, "PADDED": padded, "DIM": dim}
    launch(
        row_statistics, (triton.cdiv(num_rows, _STATISTICS_ROWS),), d_out, out, lse, plan.last_keys, statistics,
        num_rows, pitch, ROWS=_STATISTICS_ROWS, **shape,
    )  # fmt: skip
    queries, d_outs = (tensor_map(x.view(-1, heads, dim), [64 // padded, padded, dim]) for x in (q, d_out))
    num_items = len(query_work) * kv_heads
    scalars = spec.scale * plain.LOG2E, spec.scale
    shape |= {"WINDOW": spec.window or 0, "STAGES": _STAGES, "num_warps": 4}
    keys, values = (tensor_map(x.view(-1, kv_heads * dim), [tiles.query_keys, dim]) for x in (k, v))
    launch(
        grad_queries, (min(num_items, gpu_of(q.device)[0]),), queries, d_outs, keys, values, statistics,
        plan.last_keys, turned_q, query_work, num_items, pitch, *scalars, KEYS=tiles.query_keys, **shape,
    )  # fmt: skip
    keys, values = (tensor_map(x.view(-1, kv_heads * dim), [64, dim]) for x in (k, v))
    launch(
        grad_keys, (len(key_work), kv_heads), queries, d_outs, keys, values, tensor_map(statistics, [4, _KEY_ROWS]),
        turned_k, d_values, key_work, d_values.stride(0), *scalars, ROWS=_KEY_ROWS, **shape,
    )  # fmt: skip
