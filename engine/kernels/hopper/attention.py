"""Attention with its walk over the keys in Gluon for Hopper, see `attention_walk`. What comes before and after it is
plain Triton's.

# T tokens, H query heads, K key/value heads, Dh head width
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from engine.kernels.attention_call import AttentionCall
from engine.kernels.attention_pages import AttentionSpec
from engine.kernels.hopper.attention_backward import backward
from engine.kernels.hopper.attention_walk import walk as walk_kernel
from engine.kernels.hopper.gluon import tensor_map
from engine.kernels.triton import attention as triton_attention
from engine.kernels.triton.attention_plan import DevicePlan
from engine.kernels.triton.attention_work import Tiles, WorkLists
from engine.kernels.triton.launch import gpu_of, launch

__all__ = ["backward", "forward"]

HEAD_DIMS = (64, 96, 128)
ROWS = 64  # of a consumer


def tiles_of(spec: AttentionSpec, dtype: torch.dtype, device: torch.device) -> Tiles:
    """How attention of this shape is cut up. `stages` are tiles of keys, and as many of values, in shared memory, which
    one block fills.

    With heads of 128 columns, tiles of 64 keys would read queries and keys at the 128 bytes a clock that shared memory
    has, when copies write to it too; of 128 keys it is 96.
    """
    processors, _ = gpu_of(device)
    stages, decode_stages = (4, 6) if spec.head_dim <= 64 else (2, 3)
    return Tiles(
        2 * ROWS, ROWS, 128, stages=stages, decode_stages=decode_stages, programs=processors, decode_programs=processors
    )


def forward(
    call: AttentionCall,
    want_lse: bool,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `AttentionCall`; `tiles` is for tests that want several splits of a short sequence. Head
    widths that the walk does not fit run on plain Triton alone."""
    if call.spec.head_dim not in HEAD_DIMS:
        return triton_attention.forward(call, want_lse, tiles=tiles)
    tiles = tiles or tiles_of(call.spec, call.qkv.dtype, call.qkv.device)
    return triton_attention.forward(call, want_lse, tiles=tiles, walk=walk)


def walk(q: Tensor, keys: Tensor, values: Tensor, out: Tensor, lse: Tensor | None, sums: Tensor, softmaxes: Tensor,
         spec: AttentionSpec, plan: DevicePlan, lists: WorkLists, tiles: Tiles, paged: bool,
         place: int) -> None:  # fmt: skip
    """Fills what `lists.walk` (`place` 0) or `lists.decode` (1) names: rows of `out` [T, H Dh] and `lse`, or partial
    results in `sums` [.., H, Dh] and `softmaxes` [.., H, 2]. `q` [T, H, Dh] is rotated; keys and values are in pages or
    [T_kv, K, Dh]."""
    H, K, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    group = H // K
    if paged:
        box = min(plan.page_size & -plan.page_size, tiles.block_n)
        keys, values = keys.view(-1, 1, dim), values.view(-1, 1, dim)
    else:
        box = tiles.block_n
    q = q.view(-1, H, dim)
    whole_tokens = ROWS % group == 0
    q_map = tensor_map(q, (ROWS // group, group, 64)) if whole_tokens else None
    k_map, v_map = (tensor_map(each, (box, 1, 64)) for each in (keys, values))
    items, number, programs, stages = (
        (lists.decode, lists.num_decode, tiles.decode_programs, tiles.decode_stages)
        if place
        else (lists.walk, lists.num_walk, tiles.programs, tiles.stages)
    )
    launch(
        walk_kernel, (programs if plan.fixed else min(programs, number * K),),
        None if whole_tokens else q, q_map, k_map, v_map, out, lse, sums, softmaxes, items, lists.counts, plan.tables,
        plan.last_keys, q.shape[0], spec.scale * math.log2(math.e), spec.window or 0,
        GROUP=group, KV_HEADS=K, DIM=dim, PADDED=triton.next_power_of_2(dim), PAGE=plan.page_size if paged else 0,
        BOX=box, BLOCK_N=tiles.block_n, SPLIT=tiles.split, WINDOWED=spec.window is not None, STAGES=stages,
        CONSUMERS=2 - place,
    )  # fmt: skip
