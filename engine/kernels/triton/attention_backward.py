"""Attention, backward, on a GPU (arXiv 2205.14135, algorithm 4, once for queries and once for keys).

Rows are (token, query head) pairs that share a kv head, token-major, as in the forward. Two kernels recompute the
probabilities P = 2^(c S - L) from the logarithm L that the forward saved; each program owns what it writes, and walks
the other side in a fixed order, so nothing is summed by two programs and the same call has the same bits:

  _grad_queries, one program per tile of rows:   for key tiles:  dQ += dS K          dS = P (dP - D), D = rowsum(dO O)
  _grad_keys, one program per tile of keys:      for row tiles:  dV += P' dO, dK += dS' Q     (transposed throughout)

P and dS are rounded to the model's type before the products they enter; sums are fp32. Tiles start where sequences do,
so that a sequence's gradients do not depend on the others in the batch. Tiles that no mask touches are computed without
one, tiles that it hides whole are skipped. The epilogues go back through the scale, RoPE and the norms and round once;
heads wider than 128 leave them no registers, so they do that in a launch of its own, and dK and dV in one each.

# T tokens, H query heads, K kv heads, G = H / K, Dh head width
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.attention_call import AttentionCall
from engine.kernels.attention_pages import AttentionSpec
from engine.kernels.graph import empty
from engine.kernels.triton import rotate, rotate_backward
from engine.kernels.triton.attention_backward_work import Tiles, whole_tokens, work_lists
from engine.kernels.triton.attention_plan import DevicePlan
from engine.kernels.triton.launch import launch
from engine.kernels.triton.rotate_backward import add_norm_gradient, halves, head_columns, norm_sums, turn_back

# (q, k, v, d_out, out, lse, to fill: fp32 gradients of turned queries [T, H, Dh] and keys [T_kv, K, Dh], and rows with
# those of values; spec, plan, work of either kernel): takes the place of both kernels
Walks = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, AttentionSpec, DevicePlan, Tensor,
     Tensor],
    None,
]  # fmt: skip
LOG2E = 1.4426950408889634


def tiles_for(head_dim: int, dtype: torch.dtype) -> Tiles:
    """A function of the model alone. 16-bit tiles fill the registers of two warpgroups (255 a thread) without spilling
    and stay under the 227 KB of shared memory of sm_90; fp32 has no matrix instruction here."""
    if dtype == torch.float32:
        return Tiles(16, 16, 16, 32, 8, 2)
    if head_dim <= 128:
        return Tiles(128, 64, 128, 64, 8, 3)
    return Tiles(128, 32, 128, 32, 8, 2, apart=True)


def backward(
    call: AttentionCall,
    d_out: Tensor,
    out: Tensor,
    lse: Tensor,
    tiles: Tiles | None = None,
    walks: Walks | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of qkv, and of kv where that is given; those of the norms are added to their weights' gradients.

    d_out, out [T, H Dh] in qkv's dtype and lse, fp32 [T, H] to base 2, are contiguous. Rows past the plan's have
    gradients of 0. Turned queries and keys are computed again: to save them would take the memory of qkv once more for
    each layer. `tiles` is for tests that want several of them in a short sequence, and for `walks` other than these,
    which come with tiles whose epilogue is `apart`. Same call, same bits.
    """
    qkv, spec, rope, plan, _, _, q_norm, k_norm, kv = call
    device, queries = qkv.device, spec.num_heads * spec.head_dim
    tiles = tiles or tiles_for(spec.head_dim, qkv.dtype)
    group, window = spec.num_heads // spec.num_kv_heads, spec.window or 0
    on_device = plan.on_device(device)
    query_work, key_work = on_device.derived(
        (tiles, group, window),
        lambda: [torch.from_numpy(table).to(device) for table in work_lists(plan, group, window, tiles)],
    )
    q, k, v = rotate.forward(call, on_device)
    d_qkv = empty(tuple(qkv.shape), qkv.dtype, device)
    d_kv = None if kv is None else empty(tuple(kv.shape), kv.dtype, device)
    kv_rows, d_kv_rows = (qkv[:, queries:], d_qkv[:, queries:]) if kv is None or d_kv is None else (kv, d_kv)
    d_qkv[on_device.num_tokens :].zero_()
    d_kv_rows[on_device.num_keys :].zero_()
    turned_q = turned_k = None
    if tiles.apart:
        turned_q = empty((on_device.num_tokens, spec.num_heads, spec.head_dim), torch.float32, device)
        turned_k = empty((on_device.num_keys, spec.num_kv_heads, spec.head_dim), torch.float32, device)
    if walks is not None and turned_q is not None and turned_k is not None:
        d_values = d_kv_rows[:, spec.num_kv_heads * spec.head_dim :]
        walks(q, k, v, d_out, out, lse, turned_q, turned_k, d_values, spec, on_device, query_work, key_work)
    else:
        fused_q, fused_k = (None, None) if tiles.apart else (q_norm, k_norm)
        delta = empty((qkv.shape[0], spec.num_heads), torch.float32, device)
        scalars = spec.scale * LOG2E, spec.scale, spec.eps
        shape = {
            "HEADS": spec.num_heads, "GROUP": group, "DIM": spec.head_dim, "WINDOW": window,
            "BLOCK": triton.next_power_of_2(spec.head_dim), "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
        }  # fmt: skip
        programs = query_work.shape[0], spec.num_kv_heads
        sums = norm_sums(programs, fused_q, q)
        launch(
            _grad_queries, programs, q, k, v, d_out, out, lse, delta, on_device.last_keys, on_device.query_positions,
            rope, qkv, None if fused_q is None else fused_q.data, d_qkv, sums, turned_q, query_work, *scalars,
            qkv.stride(0), d_qkv.stride(0), ROWS=tiles.query_rows, KEYS=tiles.query_keys, **shape,
        )  # fmt: skip
        add_norm_gradient(sums, fused_q)
        programs = key_work.shape[0], spec.num_kv_heads
        sums = norm_sums(programs, fused_k, q)
        for d_k, d_v in ((False, True), (True, False)) if tiles.apart else ((True, True),):
            launch(
                _grad_keys, programs, q, k, v, d_out, lse, delta, on_device.last_keys, on_device.key_positions, rope,
                kv_rows, None if fused_k is None else fused_k.data, d_kv_rows, sums, turned_k, key_work, *scalars,
                kv_rows.stride(0), d_kv_rows.stride(0), ROWS=tiles.key_rows, KEYS=tiles.key_keys, D_K=d_k, D_V=d_v,
                **shape,
            )  # fmt: skip
        add_norm_gradient(sums, fused_k)
    if turned_q is not None and turned_k is not None:
        rotate_backward.backward(turned_q, qkv, d_qkv, on_device.query_positions, rope, q_norm, spec.eps)
        rotate_backward.backward(turned_k, kv_rows, d_kv_rows, on_device.key_positions, rope, k_norm, spec.eps)
    return d_qkv, d_kv


@triton.jit
def _rows_of(row, BLOCK: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr):
    """Tokens and heads of the rows from `row` on, tokens counted from that of `row`; tiles are STEP rows apart."""
    lane = tl.arange(0, BLOCK)
    if STEP % GROUP != 0:  # else tiles start with a token
        lane += row % GROUP
    return lane // GROUP, lane % GROUP


@triton.jit
def _load(pointer, valid, inside, MASKED: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """A tile; 0 in columns that are not `inside` a head, and, where MASKED, in rows that are not `valid`."""
    if MASKED:
        if DIM == BLOCK:
            return tl.load(pointer, mask=valid[:, None], other=0.0)
        return tl.load(pointer, mask=valid[:, None] & inside[None, :], other=0.0)
    if DIM == BLOCK:
        return tl.load(pointer)
    return tl.load(pointer, mask=inside[None, :], other=0.0)


@triton.jit
def _load_rows(pointer, valid, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointer, mask=valid, other=0.0)
    return tl.load(pointer)


@triton.jit
def _walk_keys(
    d_q, q, d_out, lse, delta, own, k, v, factor, begin, end, jump, over, last,
    KEY_ROW: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Adds dS K of the key tiles from `begin` to `end` to d_q, those from `jump` on moved on by `over` (where MASKED).
    Keys and `own`, the last that a row sees, count from where `k` and `v` point; `last` is the highest of these."""
    column, inside = head_columns(DIM, BLOCK)
    lane = tl.arange(0, KEYS)
    for key in range(begin, end, KEYS):
        if MASKED:
            key += tl.where(key >= jump, over, 0)
        at = key + lane
        step = tl.cast(key, tl.int64) * KEY_ROW
        tile_at = lane[:, None] * KEY_ROW + column[None, :]
        k_tile = _load(k + step + tile_at, at <= last, inside, MASKED, DIM, BLOCK)
        v_tile = _load(v + step + tile_at, at <= last, inside, MASKED, DIM, BLOCK)
        scores = tl.dot(q, tl.trans(k_tile), input_precision="ieee")  # [rows, keys]
        p = tl.exp2(tl.fma(scores, factor, -lse[:, None]))
        if MASKED:
            visible = at[None, :] <= own[:, None]
            if WINDOW:
                visible = visible & (at[None, :] > own[:, None] - WINDOW)
            p = tl.where(visible, p, 0.0)
        d_p = tl.dot(d_out, tl.trans(v_tile), input_precision="ieee")
        d_s = (p * (d_p - delta[:, None])).to(q.dtype)
        d_q = tl.dot(d_s, k_tile, d_q, input_precision="ieee")
    return d_q


@triton.jit
def _query_rows(item, kv_head, ROWS: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr):
    """First token of a tile of rows; token, head and presence of each row. Read from memory at each call: what is
    carried through the loops instead takes registers that these need."""
    row = tl.load(item + 2, volatile=True)
    first = tl.load(item, volatile=True) + row // GROUP
    tokens, heads = _rows_of(row, ROWS, GROUP, STEP)
    tokens += first
    valid = (tokens < tl.load(item + 1, volatile=True)) & (tl.arange(0, ROWS) < STEP)
    return first, tokens, heads + kv_head * GROUP, valid


@triton.jit
def _key_rows(item, KEYS: tl.constexpr):
    """Row of `kv` and presence of each key of a tile; read from memory, as _query_rows does."""
    lane = tl.arange(0, KEYS)
    first = tl.load(item, volatile=True) + tl.load(item + 1, volatile=True)
    return first + lane, lane < tl.load(item + 2, volatile=True)


@triton.jit
def _grad_queries(
    q, k, v, d_out, out, lse, delta, last_keys, positions, rope, x, q_norm, d_x, sums, turned, work,
    factor, scale, eps, x_row, d_x_row,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    STEP: tl.constexpr = whole_tokens(ROWS, GROUP)
    KEY_ROW: tl.constexpr = HEADS // GROUP * DIM
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    last_token = tl.load(work + tile * 4 + 1)
    row = tl.load(work + tile * 4 + 2)
    first_key = tl.load(work + tile * 4 + 3)
    first, tokens, heads, valid = _query_rows(work + tile * 4, kv_head, ROWS, GROUP, STEP)
    wide = tokens.to(tl.int64)
    column, inside = head_columns(DIM, BLOCK)
    at = (wide * HEADS + heads) * DIM
    tile_at = at[:, None] + column[None, :]
    q_tile = _load(q + tile_at, valid, inside, True, DIM, BLOCK)
    d_out_tile = _load(d_out + tile_at, valid, inside, True, DIM, BLOCK)
    out_tile = _load(out + tile_at, valid, inside, True, DIM, BLOCK)
    dots = tl.sum(d_out_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(delta + wide * HEADS + heads, dots, mask=valid)
    logs = tl.load(lse + wide * HEADS + heads, mask=valid, other=0.0)
    own = tl.load(last_keys + tokens, mask=valid, other=0)

    last_of_tile = first + (row % GROUP + STEP - 1) // GROUP
    lowest = tl.load(last_keys + first)
    highest = tl.load(last_keys + tl.minimum(last_of_tile, last_token - 1))
    begin = 0
    full_begin = 0
    if WINDOW:
        begin = tl.maximum(lowest - WINDOW + 1, 0) // KEYS * KEYS
        full_begin = tl.cdiv(tl.maximum(highest - WINDOW + 1, 0), KEYS) * KEYS
    full_end = tl.maximum((lowest + 1) // KEYS * KEYS, full_begin)
    k += first_key.to(tl.int64) * KEY_ROW + kv_head * DIM
    v += first_key.to(tl.int64) * KEY_ROW + kv_head * DIM
    d_q = tl.zeros([ROWS, BLOCK], tl.float32)
    d_q = _walk_keys(d_q, q_tile, d_out_tile, logs, dots, own, k, v, factor, full_begin, full_end, 0, 0, highest,
                     KEY_ROW, DIM, BLOCK, KEYS, WINDOW, False)  # fmt: skip
    d_q = _walk_keys(d_q, q_tile, d_out_tile, logs, dots, own, k, v, factor, begin, full_begin + highest + 1 - full_end,
                     full_begin, full_end - full_begin, highest, KEY_ROW, DIM, BLOCK, KEYS, WINDOW, True)  # fmt: skip

    _, tokens, heads, valid = _query_rows(work + tile * 4, kv_head, ROWS, GROUP, STEP)
    wide = tokens.to(tl.int64)
    if turned is not None:
        tile_at = ((wide * HEADS + heads) * DIM)[:, None] + column[None, :]
        tl.store(turned + tile_at, d_q * scale, mask=valid[:, None] & inside[None, :])
    else:
        position = tl.load(positions + tokens, mask=valid, other=0).to(tl.int64)
        first_half, second_half = halves(d_q * scale, ROWS, BLOCK)
        turn_back(first_half, second_half, x + wide * x_row + heads * DIM, rope + position * DIM, q_norm,
                  d_x + wide * d_x_row + heads * DIM, sums, tile * tl.num_programs(1) + kv_head, valid, eps, DIM,
                  BLOCK)  # fmt: skip


@triton.jit
def _walk_rows(
    d_k, d_v, k, v, q, d_out, lse, delta, last_keys, factor, first, begin, end, jump, over, last_row, key,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr, D_K: tl.constexpr,
    D_V: tl.constexpr,
):  # fmt: skip
    """Adds dS' Q and P' dO of the row tiles from `begin` to `end` to d_k and d_v, those from `jump` on moved on by
    `over` (where MASKED). Rows count from token `first`; a tile takes STEP of them. Those from `last_row` on have
    q = dO = D = 0, hence add zeros, whatever their P."""
    PARTIAL: tl.constexpr = MASKED or STEP != ROWS
    column, inside = head_columns(DIM, BLOCK)
    keys = key + tl.arange(0, KEYS)
    lane = tl.arange(0, ROWS)
    for row in range(begin, end, STEP):
        if MASKED:
            row += tl.where(row >= jump, over, 0)
        tokens, heads = _rows_of(row, ROWS, GROUP, STEP)
        token = first + row // GROUP
        valid = lane < tl.minimum(last_row - row, STEP)
        base = tl.cast(token, tl.int64) * HEADS  # what follows fits 32 bits, and fewer registers
        at = tokens * HEADS + heads
        tile_at = at[:, None] * DIM + column[None, :]
        q_tile = _load(q + base * DIM + tile_at, valid, inside, PARTIAL, DIM, BLOCK)
        d_out_tile = _load(d_out + base * DIM + tile_at, valid, inside, PARTIAL, DIM, BLOCK)
        logs = _load_rows(lse + base + at, valid, PARTIAL)
        if D_K:
            dots = _load_rows(delta + base + at, valid, PARTIAL)
        scores = tl.dot(k, tl.trans(q_tile), input_precision="ieee")  # [keys, rows]
        p = tl.exp2(tl.fma(scores, factor, -logs[None, :]))
        if MASKED:
            own = tl.load(last_keys + token + tokens, mask=valid, other=-1)
            visible = keys[:, None] <= own[None, :]
            if WINDOW:
                visible = visible & (keys[:, None] > own[None, :] - WINDOW)
            p = tl.where(visible, p, 0.0)
        if D_V:
            d_v = tl.dot(p.to(q_tile.dtype), d_out_tile, d_v, input_precision="ieee")
        if D_K:
            d_p = tl.dot(v, tl.trans(d_out_tile), input_precision="ieee")
            d_s = (p * (d_p - dots[None, :])).to(q_tile.dtype)
            d_k = tl.dot(d_s, q_tile, d_k, input_precision="ieee")
    return d_k, d_v


@triton.jit
def _grad_keys(
    q, k, v, d_out, lse, delta, last_keys, positions, rope, x, k_norm, d_x, sums, turned, work,
    factor, scale, eps, x_row, d_x_row,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, WINDOW: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = ROWS // 2  # of a tile with masks, which take registers
    STEP: tl.constexpr = whole_tokens(ROWS, GROUP, HALF)
    HALF_STEP: tl.constexpr = whole_tokens(HALF, GROUP)
    KEY_ROW: tl.constexpr = HEADS // GROUP * DIM
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    key = tl.load(work + tile * 7 + 1)
    seen = tl.load(work + tile * 7 + 3)
    whole = tl.load(work + tile * 7 + 4)
    cut = tl.load(work + tile * 7 + 5)
    hidden = tl.load(work + tile * 7 + 6)
    column, inside = head_columns(DIM, BLOCK)
    keys, valid = _key_rows(work + tile * 7, KEYS)
    wide = keys.to(tl.int64)
    tile_at = wide[:, None] * KEY_ROW + kv_head * DIM + column[None, :]
    k_tile = _load(k + tile_at, valid, inside, True, DIM, BLOCK)
    v_tile = _load(v + tile_at, valid, inside, True, DIM, BLOCK)
    q += kv_head * GROUP * DIM
    d_out += kv_head * GROUP * DIM
    lse += kv_head * GROUP
    delta += kv_head * GROUP

    end = (hidden - seen) * GROUP
    full_begin = tl.cdiv((whole - seen) * GROUP, HALF_STEP) * HALF_STEP
    full_end = full_begin + tl.maximum((cut - seen) * GROUP - full_begin, 0) // STEP * STEP
    d_k = tl.zeros([KEYS, BLOCK], tl.float32)
    d_v = tl.zeros([KEYS, BLOCK], tl.float32)
    d_k, d_v = _walk_rows(d_k, d_v, k_tile, v_tile, q, d_out, lse, delta, last_keys, factor, seen, full_begin,
                          full_end, 0, 0, end, key, HEADS, GROUP, DIM, BLOCK, ROWS, STEP, KEYS, WINDOW, False,
                          D_K, D_V)  # fmt: skip
    d_k, d_v = _walk_rows(d_k, d_v, k_tile, v_tile, q, d_out, lse, delta, last_keys, factor, seen, 0,
                          full_begin + end - full_end, full_begin, full_end - full_begin, end, key,
                          HEADS, GROUP, DIM, BLOCK, HALF, HALF_STEP, KEYS, WINDOW, True, D_K, D_V)  # fmt: skip

    keys, valid = _key_rows(work + tile * 7, KEYS)
    wide = keys.to(tl.int64)
    stored = valid[:, None] & inside[None, :]
    heads = tl.num_programs(1)
    d_x += kv_head * DIM
    to = d_x + wide * d_x_row
    if D_V:
        values = to[:, None] + heads * DIM + column[None, :]
        tl.store(values, d_v.to(d_x.dtype.element_ty), mask=stored)
    if D_K:
        if turned is not None:
            at = (wide * heads + kv_head)[:, None] * DIM + column[None, :]
            tl.store(turned + at, d_k * scale, mask=stored)
        else:
            position = tl.load(positions + keys, mask=valid, other=0).to(tl.int64)
            first_half, second_half = halves(d_k * scale, KEYS, BLOCK)
            turn_back(first_half, second_half, x + wide * x_row + kv_head * DIM, rope + position * DIM, k_norm, to,
                      sums, tile * heads + kv_head, valid, eps, DIM, BLOCK)  # fmt: skip
