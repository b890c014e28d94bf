"""Paged attention on a GPU: one walk over the keys for training, prefill, chunked prefill and decode.

What bits a row has, operation by operation (fp32; no multiplication is contracted with an addition unless fma is said;
c = scale * log2 e, rounded to fp32 once):

    run = (M = -1e30, L = 0, O = 0)
    for every split of `split` keys, aligned to key 0, in order
      (m, l, o) = (-1e30, 0, 0)
      for every tile of `block_n` keys of the split, in order
        s = q K^T                               fp32, along the head; -inf where the row does not see the key
        m' = max(m, max s * c)
        p = exp2(fma(s, c, -m')), a = exp2(m - m')
        l = fma(l, a, sum p)
        o = o * a + round(p) V                  p rounded to the model's dtype, V 0 where there is no key
        m = m'
      M' = max(M, m), a = exp2(M - M'), b = exp2(m - M')           `_fold`
      L = fma(L, a, l * b), O = fma(O, a, o * b), M = M'
    out = O * (1 / L) + 0, lse = M + log2 L                        `_finish`

Tiles and splits of which a row sees nothing change nothing (p = 0, a = 1), so they are skipped where no row of an item
sees any of them. An item with all keys of its rows folds its splits in registers. Where few rows have many keys, each
split is an item of its own, whose (m, l, o) goes to memory, and `_fold_parts` folds them with the same function; so
tiles of `decode_m` rows, which never fold, have registers left to keep more loads on their way.

Tiles of `block_m` rows and of `decode_m` rows must multiply with the same instruction and sum p in the same order: on
sm_90 both are whole m64 wgmma instructions, 16 rows a warp, so a row lies in one warp and its sum goes the same way.
Elsewhere both tiles are the same size. No GPU has compared the two yet.

# T tokens, H query heads, K key/value heads, Dh head width
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.errors import InputError
from engine.kernels.attention_call import AttentionCall
from engine.kernels.attention_pages import AttentionSpec
from engine.kernels.graph import empty
from engine.kernels.triton import rotate
from engine.kernels.triton.attention_backward import backward
from engine.kernels.triton.attention_plan import DevicePlan
from engine.kernels.triton.attention_work import ITEM, TURN, Tiles, WorkLists
from engine.kernels.triton.launch import gpu_of, launch

__all__ = ["attend", "backward", "forward", "tiles_of"]

# (q, keys, values, out, partial sums, partial softmaxes, spec, plan, lists, tiles)
Decode = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, AttentionSpec, DevicePlan, WorkLists, Tiles], None]
# (q, keys, values, out, lse, partial sums, partial softmaxes, spec, plan, lists, tiles, paged, place): the tiles of
# block_m rows, `lists.walk`, where `place` is 0, and those of decode_m rows, `lists.decode`, where it is 1
Walk = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor, AttentionSpec, DevicePlan, WorkLists, Tiles, bool,
     int],
    None,
]  # fmt: skip
NO_SCORE = tl.constexpr(-1e30)  # the running maximum before the first key
_ITEM = tl.constexpr(ITEM)
_TURN = tl.constexpr(TURN)
_FOLD_PROGRAMS = 528


def tiles_of(spec: AttentionSpec, dtype: torch.dtype, device: torch.device) -> Tiles:
    """How attention of this shape is cut up on this device. `block_n` and `split` follow from head_dim and dtypes."""
    width = triton.next_power_of_2(spec.head_dim)
    processors, major = gpu_of(device)
    if dtype == torch.float32:  # products on the plain cores, whose operands all lie in registers
        block_m, block_n = (64, 32) if width <= 64 else (32, 32 if width <= 128 else 16)
        e4m3 = spec.kv_dtype is not None  # with widened tiles, a second stage would leave too few registers
        if e4m3:
            block_m, block_n = 32, 32
        return Tiles(
            block_m, block_m, block_n, warps=8, decode_warps=8, stages=2 - e4m3, decode_stages=2 - e4m3,
            programs=processors, decode_programs=processors, fold_after=width > 64,
        )  # fmt: skip
    if major == 9:
        if width > 128:  # two warpgroups side by side: the two sums of 64 x 256 do not fit in the registers of one
            return Tiles(
                64, 64, 64, warps=8, decode_warps=8, programs=processors, decode_programs=processors, reload=True
            )
        # More would leave no room for the two sums of 128 columns, or for tiles of 64 columns widened from e4m3.
        block_n = 128 if width <= 64 and spec.kv_dtype is None else 64
        return Tiles(
            128, 64, block_n, warps=8, stages=3, decode_stages=3, programs=processors, decode_programs=2 * processors,
            reload=True,
        )  # fmt: skip
    block_n, stages = (64, 2) if width <= 128 else (32, 1)
    decode_stages = 3 if major == 10 and width <= 128 else stages  # on others a block may have no more than 100 KB
    return Tiles(
        64, 64, block_n, warps=8, decode_warps=8, stages=stages, decode_stages=decode_stages,
        programs=processors, decode_programs=processors, fold_after=True,
    )  # fmt: skip


def forward(
    call: AttentionCall,
    want_lse: bool,
    tiles: Tiles | None = None,
    decode: Decode | None = None,
    walk: Walk | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The output [T, H Dh], and lse fp32 [T, H] where it is wanted.

    lse[t, h] = log2 of the sum over the keys that row t sees of exp(scale q.k), a logarithm to base 2. `tiles` is for
    tests that want several splits of a short sequence, and for another `decode` or `walk` than Triton's.
    """
    qkv, spec = call.qkv, call.spec
    on_device = call.plan.on_device(qkv.device)
    _check(call, on_device)
    tiles = tiles or tiles_of(spec, qkv.dtype, qkv.device)
    lists = on_device.lists(spec.num_heads // spec.num_kv_heads, spec.num_kv_heads, spec.window or 0, tiles)
    q, k, v = rotate.forward(call, on_device)
    out = empty((qkv.shape[0], spec.num_heads * spec.head_dim), qkv.dtype, qkv.device)
    lse = empty((qkv.shape[0], spec.num_heads), torch.float32, qkv.device) if want_lse else None
    attend(q, k, v, out, lse, spec, on_device, lists, tiles, paged=call.keys is not None, decode=decode, walk=walk)
    return out, lse


def _check(call: AttentionCall, plan: DevicePlan) -> None:
    qkv, rope, keys = call.qkv, call.rope, call.keys
    if qkv.shape[0] != plan.num_tokens and not plan.fixed:
        raise InputError(f"qkv has {qkv.shape[0]} rows and the plan {plan.num_tokens}")
    if plan.num_positions > rope.shape[0]:
        raise InputError(f"a position is {plan.num_positions - 1} and the RoPE table ends at {rope.shape[0] - 1}")
    if keys is not None and plan.num_pages > keys.shape[0]:
        raise InputError(f"the plan names page {plan.num_pages - 1} of {keys.shape[0]}")


def attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, spec: AttentionSpec, plan: DevicePlan,
           lists: WorkLists, tiles: Tiles, paged: bool, decode: Decode | None = None,
           walk: Walk | None = None) -> None:  # fmt: skip
    """Fills `out` and `lse` from rotated queries [T, H, Dh] and keys and values, in pages or as [T_kv, K, Dh].

    `walk` does what `_attend` does, and `decode` what is left after the tiles of `block_m` rows: `lists.decode`, then
    the fold.
    """
    H, K, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    partials = tiles.partials if plan.fixed else lists.num_partials
    sums = empty((partials, H, dim), torch.float32, q.device)
    softmaxes = empty((partials, H, 2), torch.float32, q.device)
    if paged:
        strides = (K * plan.page_size * dim, plan.page_size * dim, dim)
    else:
        strides = (0, dim, K * dim)
    shape = {"GROUP": H // K, "KV_HEADS": K, "DIM": dim, "PADDED": triton.next_power_of_2(dim)}
    for place, (items, number, block, warps, stages, programs) in enumerate((
        (lists.walk, lists.num_walk, tiles.block_m, tiles.warps, tiles.stages, tiles.programs),
        (lists.decode, lists.num_decode, tiles.decode_m, tiles.decode_warps, tiles.decode_stages,
         tiles.decode_programs),
    )):  # fmt: skip
        if place == 1 and decode is not None:
            decode(q, k, v, out, sums, softmaxes, spec, plan, lists, tiles)
            return
        if not (number or plan.fixed):
            continue
        if walk is not None:
            walk(q, k, v, out, lse, sums, softmaxes, spec, plan, lists, tiles, paged, place)
        else:
            launch(
                _attend, (programs if plan.fixed else min(programs, number * K),), q, k, v, out, lse, sums, softmaxes,
                items, lists.counts, plan.tables, plan.last_keys, q.shape[0], spec.scale * math.log2(math.e),
                spec.window or 0, *strides, **shape, LIST=place, FOLDS=place == 0, PAGE=plan.page_size if paged else 0,
                BLOCK_M=block, BLOCK_N=tiles.block_n, SPLIT=tiles.split, WINDOWED=spec.window is not None,
                STAGES=stages, FOLD_AFTER=tiles.fold_after, RELOAD=tiles.reload, num_warps=warps, num_stages=stages,
            )  # fmt: skip
    if lists.num_turns or plan.fixed:
        programs = _FOLD_PROGRAMS if plan.fixed else min(_FOLD_PROGRAMS, lists.num_turns * K)
        launch(
            _fold_parts, (programs,), sums, softmaxes, out, lse, lists.turns, lists.parts, lists.counts, q.shape[0],
            PADDED_GROUP=triton.next_power_of_2(H // K), **shape,
        )  # fmt: skip


@triton.jit
def _fold(run_max, run_sum, run_acc, part_max, part_sum, part_acc):
    """Folds what a later split came to into what the ones before it came to."""
    top = tl.maximum(run_max, part_max)
    a, b = tl.exp2(run_max - top), tl.exp2(part_max - top)
    return (
        top,
        tl.fma(run_sum, a, part_sum * b),
        tl.fma(run_acc, a[:, None] + tl.zeros_like(run_acc), part_acc * b[:, None]),
    )


@triton.jit
def _finish(run_max, run_sum, run_acc):
    """Output and lse. + 0: a sum that is -0 in one order of skipping may be +0 in another. Rows that are not there have
    a sum of 0, and are divided by 1."""
    divisor = tl.where(run_sum > 0, run_sum, 1.0)
    return run_acc * tl.div_rn(1.0 + tl.zeros_like(divisor), divisor)[:, None] + 0.0, run_max + tl.log2(divisor)


@triton.jit
def _pages(table, tile, key_end, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The page of each key of the tile that begins at key `tile`, or of the whole tile where it lies in one page: the
    lower and the upper half of its number. Loads of 32 bits would go through shared memory in the compiler's pipeline,
    a stage or two before those of keys and values, which would then have none left."""
    key = tile
    if PAGE % BLOCK_N != 0:
        key = tile + tl.arange(0, BLOCK_N)
    halves = table.to(tl.pointer_type(tl.uint16), bitcast=True) + key // PAGE * 2
    return tl.load(halves, mask=key < key_end, other=0), tl.load(halves + 1, mask=key < key_end, other=0)


@triton.jit
def _rows(
    first_row, num_rows, num_tokens, head,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Of the rows of an item: tokens, rows of the output (fewer than 2**31, of all heads), and which there are."""
    place = tl.arange(0, BLOCK_M)
    token = (first_row + place) // GROUP
    here = (place < num_rows) & (token < num_tokens)
    row = token * (GROUP * KV_HEADS) + head * GROUP + (first_row + place) % GROUP
    inside = here[:, None] & (tl.arange(0, PADDED) < DIM)[None] if DIM < PADDED else here[:, None]
    return token, row, here, inside


@triton.jit(do_not_specialize=["num_tokens"])
def _attend(
    q, k, v, out, lse, sums, softmaxes, items, counts, tables, last_keys, num_tokens, factor, window,
    page_stride, head_stride, slot_stride,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, LIST: tl.constexpr,
    FOLDS: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    WINDOWED: tl.constexpr, STAGES: tl.constexpr, FOLD_AFTER: tl.constexpr, RELOAD: tl.constexpr,
):  # fmt: skip
    dtype = q.dtype.element_ty
    columns = tl.arange(0, PADDED)
    for work in range(tl.program_id(0), tl.load(counts + LIST) * KV_HEADS, tl.num_programs(0)):
        item = items + work // KV_HEADS * _ITEM
        head = work % KV_HEADS
        first_row, num_rows, table = tl.load(item), tl.load(item + 1), tl.load(item + 2).to(tl.int64)
        key_begin, key_end = tl.load(item + 3), tl.load(item + 4)
        seen_begin, seen_end, part = tl.load(item + 5), tl.load(item + 6), tl.load(item + 7)
        token, row, here, inside = _rows(first_row, num_rows, num_tokens, head, GROUP, KV_HEADS, DIM, PADDED, BLOCK_M)
        queries = tl.load(q + row.to(tl.int64)[:, None] * DIM + columns[None], mask=inside, other=0.0)
        last = tl.load(last_keys + token, mask=here, other=-1)
        run_max = tl.full([BLOCK_M], NO_SCORE, tl.float32)
        run_sum = tl.zeros([BLOCK_M], tl.float32)
        run_acc = tl.zeros([BLOCK_M, PADDED], tl.float32)
        part_max, part_sum, part_acc = run_max, run_sum, run_acc
        if PAGE:
            low, high = _pages(tables + table, key_begin, key_end, PAGE, BLOCK_N)
        for tile in tl.range(key_begin, key_end, BLOCK_N, num_stages=STAGES):
            if FOLDS and not FOLD_AFTER and tile % SPLIT == 0:  # the first fold is of nothing
                run_max, run_sum, run_acc = _fold(run_max, run_sum, run_acc, part_max, part_sum, part_acc)
                part_max = tl.full([BLOCK_M], NO_SCORE, tl.float32)
                part_sum = tl.zeros([BLOCK_M], tl.float32)
                part_acc = tl.zeros([BLOCK_M, PADDED], tl.float32)
            key = tile + tl.arange(0, BLOCK_N)
            present = key < key_end
            if PAGE:  # loaded a tile before: the loads of keys and values need not wait for them
                page = low.to(tl.int32) | (high.to(tl.int32) << 16)
                start = page.to(tl.int64) * page_stride + key % PAGE * slot_stride
                low, high = _pages(tables + table, tile + BLOCK_N, key_end, PAGE, BLOCK_N)
            else:
                start = (table + key) * slot_stride
            at = (start + head * head_stride)[:, None] + columns[None]
            there = present[:, None] & (columns < DIM)[None] if DIM < PADDED else present[:, None]
            key_tile = tl.load(k + at, mask=there, other=0.0).to(dtype)
            s = tl.dot(queries, tl.trans(key_tile), input_precision="ieee")
            if (tile < seen_begin) | (tile + BLOCK_N > seen_end):
                seen = key[None] <= last[:, None]
                if WINDOWED:
                    seen &= (key + window)[None] > last[:, None]
                s = tl.where(seen, s, float("-inf"))
            top = tl.maximum(part_max, tl.max(s, 1) * factor)
            p = tl.exp2(tl.fma(s, factor + tl.zeros_like(s), -top[:, None] + tl.zeros_like(s)))
            a = tl.exp2(part_max - top)
            part_sum = tl.fma(part_sum, a, tl.sum(p, 1))
            value_tile = tl.load(v + at, mask=there, other=0.0).to(dtype)
            part_acc = tl.dot(p.to(dtype), value_tile, part_acc * a[:, None], input_precision="ieee")
            part_max = top
            if FOLDS and FOLD_AFTER and ((tile + BLOCK_N) % SPLIT == 0) & (tile + BLOCK_N < key_end):
                run_max, run_sum, run_acc = _fold(run_max, run_sum, run_acc, part_max, part_sum, part_acc)
                part_max = tl.full([BLOCK_M], NO_SCORE, tl.float32)
                part_sum = tl.zeros([BLOCK_M], tl.float32)
                part_acc = tl.zeros([BLOCK_M, PADDED], tl.float32)
        if RELOAD:
            first_row, num_rows = tl.load(item, volatile=True), tl.load(item + 1, volatile=True)
            token, row, here, inside = _rows(
                first_row, num_rows, num_tokens, head, GROUP, KV_HEADS, DIM, PADDED, BLOCK_M
            )
        if part >= 0:
            slot = row + (part - first_row // GROUP) * (GROUP * KV_HEADS)
            tl.store(sums + slot.to(tl.int64)[:, None] * DIM + columns[None], part_acc, mask=inside)
            tl.store(softmaxes + slot * 2, part_max, mask=here)
            tl.store(softmaxes + slot * 2 + 1, part_sum, mask=here)
        else:
            run_max, run_sum, run_acc = _fold(run_max, run_sum, run_acc, part_max, part_sum, part_acc)
            result, logarithm = _finish(run_max, run_sum, run_acc)
            tl.store(out + row.to(tl.int64)[:, None] * DIM + columns[None], result.to(dtype), mask=inside)
            if lse is not None:
                tl.store(lse + row, logarithm, mask=here)


@triton.jit(do_not_specialize=["num_tokens"])
def _fold_parts(
    sums, softmaxes, out, lse, turns, parts, counts, num_tokens,
    PADDED_GROUP: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    place = tl.arange(0, PADDED_GROUP)
    columns = tl.arange(0, PADDED)
    for work in range(tl.program_id(0), tl.load(counts + 2) * KV_HEADS, tl.num_programs(0)):
        turn = turns + work // KV_HEADS * _TURN
        heads = work % KV_HEADS * GROUP + place
        token, first, number = tl.load(turn).to(tl.int64), tl.load(turn + 1), tl.load(turn + 2)
        here = place < tl.where(token < num_tokens, GROUP, 0)
        inside = here[:, None] & (columns < DIM)[None]
        run_max = tl.full([PADDED_GROUP], NO_SCORE, tl.float32)
        run_sum = tl.zeros([PADDED_GROUP], tl.float32)
        run_acc = tl.zeros([PADDED_GROUP, PADDED], tl.float32)
        for i in range(number):
            slot = tl.load(parts + first + i).to(tl.int64) * (GROUP * KV_HEADS) + heads
            part_max = tl.load(softmaxes + slot * 2, mask=here, other=NO_SCORE)
            part_sum = tl.load(softmaxes + slot * 2 + 1, mask=here, other=0.0)
            part_acc = tl.load(sums + slot[:, None] * DIM + columns[None], mask=inside, other=0.0)
            run_max, run_sum, run_acc = _fold(run_max, run_sum, run_acc, part_max, part_sum, part_acc)
        result, logarithm = _finish(run_max, run_sum, run_acc)
        row = token * (GROUP * KV_HEADS) + heads
        tl.store(out + row[:, None] * DIM + columns[None], result.to(out.dtype.element_ty), mask=inside)
        if lse is not None:
            tl.store(lse + row, logarithm, mask=here)
