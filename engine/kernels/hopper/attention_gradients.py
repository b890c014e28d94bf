"""The walks of attention's backward on Hopper, see `engine.kernels.triton.attention_backward` for what they compute.

A block is two warpgroups that multiply, each with 64 of a tile's 128 rows or keys, and a warp that loads. The tile's
own side is loaded once; the side to walk comes by TMA into a ring of stages, each with a barrier that counts its bytes
(`full`) and one that counts the warpgroups that are through with it (`empty`):

  grad_queries, a tile of rows:   for key tiles:   S  = Q K',  dP  = dO V';   dQ += dS K
  grad_keys, a tile of keys:      for row tiles:   S' = K Q',  dP' = V dO';   dV += P' dO,  dK += dS' Q

S and dP are issued together, so that P = 2^(c S - L) is taken while dP is multiplied, and in grad_keys dS while P' dO
is; for the rest a warpgroup leaves the tensor cores to the other. P and dS stay in registers. A stage is given back
when its last product is done: a product in flight where a loop begins again would have the assembler wait for each.

Clocks of an SM for a step of 64 rows or keys, heads of 128 (bf16; 2,048 pairs multiplied and 128 bytes read a clock):

                    wgmma    its operands from shared memory    copies into it    2^x
  grad_queries      1,536                 1,024                       256         512
  grad_keys         2,048                 1,536                       264         512

Q of grad_queries is multiplied from registers: from shared memory its operands would take as long as the products.

The last tile of a walk may reach past its sequence: into the next one, or where nothing is. Its masks set P to 0 there,
but 0 x NaN is NaN, so these rows are zeroed in shared memory first, half of a tile by either warpgroup.

# H query heads, K kv heads, G = H / K of them share one; PADDED: the next power of 2, as many rows as a token has
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from engine.kernels.hopper.gluon import barrier, load_tile

_HALF = gl.constexpr(64)  # rows or keys of a warpgroup


@triton.jit(do_not_specialize=["num_rows"])
def row_statistics(
    d_out, out, lse, last_keys, statistics, num_rows, pitch,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What grad_keys wants of a row beside Q and dO: L, D = rowsum(dO O), and the last key it sees (an integer's bits).

    Rows that share a kv head lie side by side, PADDED a token; of the four arrays of such a head the last is free. Rows
    that are no query head's have L infinite and D 0, hence P = dS = 0, whatever their Q and dO.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, place = row // (KV_HEADS * PADDED), row % PADDED
    kv_head = row // PADDED % KV_HEADS
    inside = row < num_rows
    valid = inside & (place < GROUP)
    head = (token.to(tl.int64) * KV_HEADS + kv_head) * GROUP + place
    at = head[:, None] * DIM + tl.arange(0, DIM)[None, :]
    d_out_tile = tl.load(d_out + at, mask=valid[:, None], other=0.0).to(tl.float32)
    dots = tl.sum(d_out_tile * tl.load(out + at, mask=valid[:, None], other=0.0).to(tl.float32), 1)
    own = tl.load(last_keys + token, mask=inside, other=0)
    to = statistics + (kv_head * 4).to(tl.int64) * pitch + token * PADDED + place
    tl.store(to, tl.load(lse + head, mask=valid, other=float("inf")), mask=inside)
    tl.store(to + pitch, dots, mask=inside)
    tl.store(to + 2 * pitch, own.to(tl.float32, bitcast=True), mask=inside)


@gluon.constexpr_function
def _product_of(columns: int) -> gl.NVMMADistributedLayout:
    """How wgmma deals a product of 64 rows to the threads of a warpgroup."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def _barriers(number: gl.constexpr, count: gl.constexpr):
    """Barriers whose phases end with `count` arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):
        mbarrier.init(barriers.index(i), count)
    return barriers


@gluon.jit
def _stage(index, STAGES: gl.constexpr):
    """The stage of the `index`-th tile, and the parity of the phase of its barriers: STAGES is a power of 2."""
    return index & (STAGES - 1), (index // STAGES) & 1


@gluon.jit
def _zero_rows(tile, kept, PART: gl.constexpr):
    """Zeroes the rows from `kept` on in the first or second half of a tile's rows."""
    ROWS: gl.constexpr = tile.shape[0] // 2
    WIDTH: gl.constexpr = tile.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    half = tile.slice(PART * ROWS, ROWS, dim=0)
    value = half.load(LAYOUT)
    inside = PART * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)) < kept
    half.store(gl.where(inside[:, None], value, gl.zeros_like(value)))


@gluon.jit
def _zero_statistics(tile, kept):
    """Zeroes L and D of the rows from `kept` on."""
    ROWS: gl.constexpr = tile.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    inside = gl.arange(0, ROWS, gl.SliceLayout(0, LAYOUT)) < kept
    tile.store(gl.where(inside[None, :], tile.load(LAYOUT), 0.0))


@gluon.jit
def _meet(zeroed, phase):
    """Both warpgroups see what both have zeroed, and so do the products they issue."""
    fence_async_shared()
    barrier()
    mbarrier.arrive(zeroed)
    mbarrier.wait(zeroed, phase)


@gluon.jit
def _query_rows(work, place, KV_HEADS: gl.constexpr, PADDED: gl.constexpr):
    """The kv head of an item, the first token of its tile of rows, and the one after its sequence's last."""
    item = work + place // KV_HEADS * 4
    first = gl.load(item, volatile=True) + gl.load(item + 2, volatile=True) // PADDED
    return place % KV_HEADS, first, gl.load(item + 1, volatile=True)


@gluon.jit
def _key_range(last_keys, first, last_token, PADDED: gl.constexpr, KEYS: gl.constexpr, WINDOW: gl.constexpr):
    """First and last key + 1 that a tile of rows sees, and those between which every row sees every key."""
    lowest = gl.load(last_keys + first)
    end = gl.load(last_keys + gl.minimum(first + 2 * _HALF // PADDED, last_token) - 1) + 1
    begin = 0
    full_begin = 0
    if WINDOW:
        begin = gl.maximum(lowest - WINDOW + 1, 0) // KEYS * KEYS
        full_begin = gl.maximum(end - WINDOW, 0)
    return begin, end, full_begin, lowest + 1


@gluon.jit
def _add_queries(
    barriers, tiles, inputs,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, PADDED: gl.constexpr, DIM: gl.constexpr, KEYS: gl.constexpr,
    WINDOW: gl.constexpr, STAGES: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """dQ of 64 rows of each item: what a warpgroup of grad_queries does."""
    own_full, q_read, full, empty, zeroed = barriers
    q_rows, d_out_rows, k_ring, v_ring = tiles
    statistics, last_keys, work, num_items, turned, pitch, factor, scale = inputs
    SCORES: gl.constexpr = _product_of(KEYS)
    SUMS: gl.constexpr = _product_of(DIM)
    none = gl.zeros([_HALF, KEYS], gl.float32, SCORES)
    index = 0
    zeroings = 0
    for turn in range(gl.cdiv(num_items - gl.program_id(0), gl.num_programs(0))):
        place = gl.program_id(0) + turn * gl.num_programs(0)
        kv_head, first, last_token = _query_rows(work, place, KV_HEADS, PADDED)
        begin, end, full_begin, full_end = _key_range(last_keys, first, last_token, PADDED, KEYS, WINDOW)
        first += PART * (_HALF // PADDED)
        lane = gl.arange(0, _HALF, gl.SliceLayout(1, SCORES))
        valid = first + lane // PADDED < last_token
        at = statistics + (kv_head * 4).to(gl.int64) * pitch + first * PADDED + lane
        logs = gl.load(at, mask=valid, other=0.0)
        dots = gl.load(at + pitch, mask=valid, other=0.0)
        own = gl.load(last_keys + first + lane // PADDED, mask=valid, other=-1)
        own_stage, own_phase = _stage(turn, 2)
        mbarrier.wait(own_full.index(own_stage), own_phase)
        q = q_rows.index(PART).reshape([_HALF, DIM]).load(gl.DotOperandLayout(0, SCORES, 2))
        mbarrier.arrive(q_read)
        d_out = d_out_rows.index(own_stage * 2 + PART).reshape([_HALF, DIM])
        d_q = gl.zeros([_HALF, DIM], gl.float32, SUMS)
        for key in range(begin, end, KEYS):
            stage, phase = _stage(index, STAGES)
            k = k_ring.index(stage)
            v = v_ring.index(stage)
            mbarrier.wait(full.index(stage), phase)
            if key + KEYS > end:
                _zero_rows(k, end - key, PART)
                _zero_rows(v, end - key, PART)
                _meet(zeroed, zeroings & 1)
                zeroings += 1
            s = warpgroup_mma(q, k.permute((1, 0)), none, use_acc=False, is_async=True)
            d_p = warpgroup_mma(d_out, v.permute((1, 0)), none, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
            p = gl.exp2(gl.fma(s, factor, -logs[:, None]))
            if (key < full_begin) | (key + KEYS > full_end):
                keys = (key + gl.arange(0, KEYS, gl.SliceLayout(0, SCORES)))[None, :]
                visible = keys <= own[:, None]
                if WINDOW:
                    visible = visible & (keys > own[:, None] - WINDOW)
                p = gl.where(visible, p, 0.0)
            d_p = warpgroup_mma_wait(0, deps=(d_p,))
            d_s = gl.convert_layout((p * (d_p - dots[:, None])).to(k_ring.dtype), gl.DotOperandLayout(0, SUMS, 2))
            d_q = warpgroup_mma_wait(0, deps=(warpgroup_mma(d_s, k, d_q, is_async=True),))
            mbarrier.arrive(empty.index(stage))
            index += 1

        kv_head, first, last_token = _query_rows(work, place, KV_HEADS, PADDED)
        lane = gl.arange(0, _HALF, gl.SliceLayout(1, SUMS))
        token = first + PART * (_HALF // PADDED) + lane // PADDED
        at = ((token.to(gl.int64) * KV_HEADS + kv_head) * GROUP + lane % PADDED) * DIM
        to = turned + at[:, None] + gl.arange(0, DIM, gl.SliceLayout(0, SUMS))[None, :]
        gl.store(to, d_q * scale, mask=((token < last_token) & (lane % PADDED < GROUP))[:, None])


@gluon.jit
def _load_keys(
    barriers, tiles, sources,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, PADDED: gl.constexpr, DIM: gl.constexpr, KEYS: gl.constexpr,
    WINDOW: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What the loading warp of grad_queries does: it goes on to the next item while this one is multiplied."""
    own_full, q_read, full, empty, _zeroed = barriers
    q_rows, d_out_rows, k_ring, v_ring = tiles
    q, d_out, k, v, last_keys, work, num_items = sources
    index = 0
    for turn in range(gl.cdiv(num_items - gl.program_id(0), gl.num_programs(0))):
        place = gl.program_id(0) + turn * gl.num_programs(0)
        kv_head, first, last_token = _query_rows(work, place, KV_HEADS, PADDED)
        begin, end, _full_begin, _full_end = _key_range(last_keys, first, last_token, PADDED, KEYS, WINDOW)
        first_key = gl.load(work + place // KV_HEADS * 4 + 3)
        ready = own_full.index(turn & 1)
        mbarrier.wait(q_read, (turn & 1) ^ 1)
        mbarrier.expect(ready, 4 * _HALF * DIM * 2)
        for part in gl.static_range(2):
            at = first + part * (_HALF // PADDED)
            load_tile(q, [at, kv_head * GROUP, 0], ready, q_rows.index(part))
            load_tile(d_out, [at, kv_head * GROUP, 0], ready, d_out_rows.index((turn & 1) * 2 + part))
        for key in range(begin, end, KEYS):
            stage, phase = _stage(index, STAGES)
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.expect(full.index(stage), 2 * KEYS * DIM * 2)
            load_tile(k, [first_key + key, kv_head * DIM], full.index(stage), k_ring.index(stage))
            load_tile(v, [first_key + key, kv_head * DIM], full.index(stage), v_ring.index(stage))
            index += 1


@gluon.jit(do_not_specialize=["num_items"])
def grad_queries(
    q, d_out, k, v, statistics, last_keys, turned, work, num_items, pitch, factor, scale,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, PADDED: gl.constexpr, DIM: gl.constexpr, KEYS: gl.constexpr,
    WINDOW: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """An item is a tile of rows of a kv head; a program takes every so many-th, and loads the next while it multiplies.

    Q goes to registers when an item begins, so one place for it is enough. dO has two: who has read an item's Q has
    done with the dO of the item before.
    """
    q_rows = gl.allocate_shared_memory(q.dtype, [2, _HALF // PADDED, PADDED, DIM], q.layout)
    d_out_rows = gl.allocate_shared_memory(q.dtype, [4, _HALF // PADDED, PADDED, DIM], q.layout)
    k_ring = gl.allocate_shared_memory(k.dtype, [STAGES, KEYS, DIM], k.layout)
    v_ring = gl.allocate_shared_memory(k.dtype, [STAGES, KEYS, DIM], k.layout)
    own_full = _barriers(2, 1)
    q_read = _barriers(1, 2).index(0)
    full = _barriers(STAGES, 1)
    empty = _barriers(STAGES, 2)
    zeroed = _barriers(1, 2).index(0)
    fence_async_shared()
    barriers = (own_full, q_read, full, empty, zeroed)
    tiles = (q_rows, d_out_rows, k_ring, v_ring)
    inputs = (statistics, last_keys, work, num_items, turned, pitch, factor, scale)
    sources = (q, d_out, k, v, last_keys, work, num_items)
    gl.warp_specialize(
        [
            (_add_queries, (barriers, tiles, inputs, KV_HEADS, GROUP, PADDED, DIM, KEYS, WINDOW, STAGES, 0)),
            (_add_queries, (barriers, tiles, inputs, KV_HEADS, GROUP, PADDED, DIM, KEYS, WINDOW, STAGES, 1)),
            (_load_keys, (barriers, tiles, sources, KV_HEADS, GROUP, PADDED, DIM, KEYS, WINDOW, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _row_range(work, PADDED: gl.constexpr):
    """First token that sees a key of a tile; rows to walk from there; those between which every row sees every key."""
    item = work + gl.program_id(0) * 7
    seen = gl.load(item + 3)
    end = (gl.load(item + 6) - seen) * PADDED
    return seen, end, (gl.load(item + 4) - seen) * PADDED, gl.minimum((gl.load(item + 5) - seen) * PADDED, end)


@gluon.jit
def _add_keys(
    barriers, tiles, inputs,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, PADDED: gl.constexpr, DIM: gl.constexpr, ROWS: gl.constexpr,
    WINDOW: gl.constexpr, STAGES: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """dK and dV of 64 keys: what a warpgroup of grad_keys does."""
    resident, full, empty, zeroed = barriers
    k_rows, v_rows, q_ring, d_out_ring, statistics_ring = tiles
    work, turned, d_values, d_row, factor, scale = inputs
    SCORES: gl.constexpr = _product_of(ROWS)
    SUMS: gl.constexpr = _product_of(DIM)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    _, end, full_begin, full_end = _row_range(work, PADDED)
    item = work + gl.program_id(0) * 7
    key = gl.load(item + 1) + PART * _HALF
    k = k_rows.index(PART)
    v = v_rows.index(PART)
    d_k = gl.zeros([_HALF, DIM], gl.float32, SUMS)
    d_v = gl.zeros([_HALF, DIM], gl.float32, SUMS)
    mbarrier.wait(resident, 0)
    for index in range(gl.cdiv(end, ROWS)):
        row = index * ROWS
        stage, phase = _stage(index, STAGES)
        q = q_ring.index(stage).reshape([ROWS, DIM])
        d_out = d_out_ring.index(stage).reshape([ROWS, DIM])
        statistics = statistics_ring.index(stage)
        mbarrier.wait(full.index(stage), phase)
        if row + ROWS > end:
            _zero_rows(q, end - row, PART)
            _zero_rows(d_out, end - row, PART)
            if PART == 0:
                _zero_statistics(statistics, end - row)
            _meet(zeroed, 0)
        none = gl.zeros([_HALF, ROWS], gl.float32, SCORES)
        dots = none + gl.sum(statistics.slice(1, 1, dim=0).load(SCORES), 0)[None, :]
        minus_dots = gl.inline_asm_elementwise("neg.f32 $0, $1;", "=f,f", [dots], gl.float32, is_pure=False, pack=1)
        s = warpgroup_mma(k, q.permute((1, 0)), none, use_acc=False, is_async=True)
        d_p = warpgroup_mma(v, d_out.permute((1, 0)), minus_dots, is_async=True)
        logs = gl.sum(statistics.slice(0, 1, dim=0).load(SCORES), 0)
        s = warpgroup_mma_wait(1, deps=(s,))
        p = gl.exp2(gl.fma(s, factor, -logs[None, :]))
        if (row < full_begin) | (row + ROWS > full_end):
            own = gl.sum(statistics.slice(2, 1, dim=0).load(SCORES).to(gl.int32, bitcast=True), 0)
            keys = (key + gl.arange(0, _HALF, gl.SliceLayout(1, SCORES)))[:, None]
            visible = keys <= own[None, :]
            if WINDOW:
                visible = visible & (keys > own[None, :] - WINDOW)
            p = gl.where(visible, p, 0.0)
        d_v_sum = warpgroup_mma(gl.convert_layout(p.to(q_ring.dtype), LEFT), d_out, d_v, is_async=True)
        d_p = warpgroup_mma_wait(1, deps=(d_p,))
        d_s = gl.convert_layout((p * d_p).to(q_ring.dtype), LEFT)
        d_k, d_v = warpgroup_mma_wait(0, deps=(warpgroup_mma(d_s, q, d_k, is_async=True), d_v_sum))
        mbarrier.arrive(empty.index(stage))

    kv_head = gl.program_id(1)
    lane = PART * _HALF + gl.arange(0, _HALF, gl.SliceLayout(1, SUMS))
    here = (lane < gl.load(item + 2, volatile=True))[:, None]
    row = (gl.load(item, volatile=True) + gl.load(item + 1, volatile=True) + lane).to(gl.int64)
    column = gl.arange(0, DIM, gl.SliceLayout(0, SUMS))[None, :]
    gl.store(turned + ((row * KV_HEADS + kv_head) * DIM)[:, None] + column, d_k * scale, mask=here)
    gl.store(d_values + (row * d_row + kv_head * DIM)[:, None] + column, d_v.to(q_ring.dtype), mask=here)


@gluon.jit
def _load_rows(
    barriers, tiles, sources,
    GROUP: gl.constexpr, PADDED: gl.constexpr, DIM: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What the loading warp of grad_keys does."""
    resident, full, empty, _ = barriers
    k_rows, v_rows, q_ring, d_out_ring, statistics_ring = tiles
    q, d_out, k, v, statistics, work = sources
    kv_head = gl.program_id(1)
    seen, end, _, _ = _row_range(work, PADDED)
    item = work + gl.program_id(0) * 7
    key = gl.load(item) + gl.load(item + 1)
    mbarrier.expect(resident, 4 * _HALF * DIM * 2)
    for part in gl.static_range(2):
        load_tile(k, [key + part * _HALF, kv_head * DIM], resident, k_rows.index(part))
        load_tile(v, [key + part * _HALF, kv_head * DIM], resident, v_rows.index(part))
    for index in range(gl.cdiv(end, ROWS)):
        token = seen + index * (ROWS // PADDED)
        stage, phase = _stage(index, STAGES)
        mbarrier.wait(empty.index(stage), phase ^ 1)
        mbarrier.expect(full.index(stage), 2 * ROWS * DIM * 2 + 4 * ROWS * 4)
        load_tile(q, [token, kv_head * GROUP, 0], full.index(stage), q_ring.index(stage))
        load_tile(d_out, [token, kv_head * GROUP, 0], full.index(stage), d_out_ring.index(stage))
        load_tile(statistics, [kv_head * 4, token * PADDED], full.index(stage), statistics_ring.index(stage))


@gluon.jit
def grad_keys(
    q, d_out, k, v, statistics, turned, d_values, work, d_row, factor, scale,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, PADDED: gl.constexpr, DIM: gl.constexpr, ROWS: gl.constexpr,
    WINDOW: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    k_rows = gl.allocate_shared_memory(k.dtype, [2, _HALF, DIM], k.layout)
    v_rows = gl.allocate_shared_memory(k.dtype, [2, _HALF, DIM], k.layout)
    q_ring = gl.allocate_shared_memory(q.dtype, [STAGES, ROWS // PADDED, PADDED, DIM], q.layout)
    d_out_ring = gl.allocate_shared_memory(q.dtype, [STAGES, ROWS // PADDED, PADDED, DIM], q.layout)
    statistics_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 4, ROWS], statistics.layout)
    resident = _barriers(1, 1).index(0)
    full = _barriers(STAGES, 1)
    empty = _barriers(STAGES, 2)
    zeroed = _barriers(1, 2).index(0)
    fence_async_shared()
    barriers = (resident, full, empty, zeroed)
    tiles = (k_rows, v_rows, q_ring, d_out_ring, statistics_ring)
    inputs = (work, turned, d_values, d_row, factor, scale)
    sources = (q, d_out, k, v, statistics, work)
    gl.warp_specialize(
        [
            (_add_keys, (barriers, tiles, inputs, KV_HEADS, GROUP, PADDED, DIM, ROWS, WINDOW, STAGES, 0)),
            (_add_keys, (barriers, tiles, inputs, KV_HEADS, GROUP, PADDED, DIM, ROWS, WINDOW, STAGES, 1)),
            (_load_rows, (barriers, tiles, sources, GROUP, PADDED, DIM, ROWS, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
