"""The walk of attention over the keys, on Hopper: parties of one block, each at its own pace.

    the producer, a warp              copies tiles of keys and values (TMA) into a ring in shared memory
    the consumers, four warps each    multiply 64 rows of an item with every tile (wgmma), and do the softmax

There are two consumers for items of 128 rows, and one, of the same code, for items of few rows (decode). What a row's
bits are is said in `engine.kernels.triton.attention`, and is the same here operation by operation. Not so the schedule:

    tile t         S(t+1) = Q K(t+1)^T is issued, then O = O a + P(t) V(t); these wait for nothing
                   when S(t+1) is there: mask, maximum, P(t+1), a, l, while the tensor cores are busy with P(t) V(t)
    every split    O goes to `before`, shared memory: two sums of 128 columns and the scores do not fit in registers

A tile in the ring is two halves of 64 columns or one, since a copy writes rows of 128 bytes. `ready` is passed when a
tile's bytes are there, `free` when all consumers have multiplied with it; the producer runs on into the next item
while the consumers finish this one.

# T tokens, K key/value heads, Dh head width
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from engine.kernels.hopper.gluon import barrier, load_tile, reshaped
from engine.kernels.triton.attention_work import ITEM

NO_SCORE = gl.constexpr(-1e30)  # the running maximum before the first key
_ITEM = gl.constexpr(ITEM)
_ROWS = gl.constexpr(64)  # of a consumer
_HALF = gl.constexpr(64)  # columns of a copy
_CONSUMER_REGISTERS = gl.constexpr(232)
_PRODUCER_REGISTERS = gl.constexpr(40)
_LONE_PRODUCER_REGISTERS = gl.constexpr(128)  # beside one consumer there are more than enough


@gluon.constexpr_function
def _in_eights(number):
    """The layout of `number` columns of scores as [number // 8, 8]."""
    eights = [[1 << bit, 0] for bit in range((number // 8).bit_length() - 1)]
    lanes, nothing = [[0, 2], [0, 4]], [0, 0]
    return gl.DistributedLinearLayout([[0, 1], *eights], [*lanes, *[nothing] * 3], [nothing] * 2, [], [number // 8, 8])


@gluon.jit(do_not_specialize=["num_tokens", "window"])
def walk(
    q, q_map, k_map, v_map, out, lse, sums, softmaxes, items, counts, tables, last_keys, num_tokens, factor, window,
    GROUP: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr, PADDED: gl.constexpr, PAGE: gl.constexpr,
    BOX: gl.constexpr, BLOCK_N: gl.constexpr, SPLIT: gl.constexpr, WINDOWED: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
):  # fmt: skip
    """Items of two consumers are those of `walk` in the work lists, counted by the first of `counts`; items of one are
    those of `decode`, none of which has keys of two splits. `q_map` is None where the consumers load queries, from `q`:
    where no whole number of tokens has 64 rows."""
    dtype: gl.constexpr = k_map.dtype
    rows_of_128_bytes: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    word: gl.constexpr = mbarrier.MBarrierLayout()
    queries = gl.allocate_shared_memory(dtype, [CONSUMERS, _ROWS, PADDED], rows_of_128_bytes)
    keys = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, PADDED], rows_of_128_bytes)
    values = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, PADDED], rows_of_128_bytes)
    before = queries  # one consumer has no use for it
    if CONSUMERS == 2:
        before = gl.allocate_shared_memory(gl.float32, [2, _ROWS, PADDED], gl.NVMMASharedLayout(128, 32, rank=2))
    ready = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], word)  # of keys, then of values
    free = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], word)
    q_ready = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], word)  # of each consumer
    q_free = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], word)
    cleaned = gl.allocate_shared_memory(gl.int64, [1, 1], word)
    for i in gl.static_range(2 * STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=CONSUMERS)
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(q_free.index(i), count=1)
    mbarrier.init(cleaned.index(0), count=CONSUMERS)
    hopper.fence_async_shared()
    barrier()
    memory = (queries, keys, values, before, ready, free, q_ready, q_free, cleaned)
    batch = (items, counts, tables, last_keys, num_tokens, factor, window)
    results = (out, lse, sums, softmaxes)
    own_queries: gl.constexpr = q_map is None
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (memory, batch, q, results, 0, own_queries, GROUP, KV_HEADS, DIM, PADDED, BLOCK_N, SPLIT,
                            WINDOWED, STAGES, 2)),
                (_consume, (memory, batch, q, results, 1, own_queries, GROUP, KV_HEADS, DIM, PADDED, BLOCK_N, SPLIT,
                            WINDOWED, STAGES, 2)),
                (_produce, (memory, batch, q_map, k_map, v_map, GROUP, KV_HEADS, PADDED, PAGE, BOX, BLOCK_N, STAGES,
                            2)),
            ],
            [4, 1], [_CONSUMER_REGISTERS, _PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (memory, batch, q, results, 0, own_queries, GROUP, KV_HEADS, DIM, PADDED, BLOCK_N, SPLIT,
                            WINDOWED, STAGES, 1)),
                (_produce, (memory, batch, q_map, k_map, v_map, GROUP, KV_HEADS, PADDED, PAGE, BOX, BLOCK_N, STAGES,
                            1)),
            ],
            [1], [_LONE_PRODUCER_REGISTERS],
        )  # fmt: skip


@gluon.jit
def _produce(
    memory, batch, q_map, k_map, v_map,
    GROUP: gl.constexpr, KV_HEADS: gl.constexpr, PADDED: gl.constexpr, PAGE: gl.constexpr, BOX: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """Copies of BOX rows and 64 columns: a page, or the part of one that a tile has, or a whole tile without pages."""
    queries, keys, values, _, ready, free, q_ready, q_free, _ = memory
    items, counts, tables, _, _, _, _ = batch
    halves: gl.constexpr = PADDED // _HALF
    boxes: gl.constexpr = BLOCK_N // BOX
    rows_of_128_bytes: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=3)
    k_boxes = reshaped(keys, [STAGES * halves * boxes, BOX, 1, _HALF], rows_of_128_bytes)
    v_boxes = reshaped(values, [STAGES * halves * boxes, BOX, 1, _HALF], rows_of_128_bytes)
    tile_of_batch = 0
    turn = 0
    for work in range(gl.program_id(0), gl.load(counts + 2 - CONSUMERS) * KV_HEADS, gl.num_programs(0)):
        item = items + work // KV_HEADS * _ITEM
        head = work % KV_HEADS
        first_row, table = gl.load(item), gl.load(item + 2)
        key_begin, key_end = gl.load(item + 3), gl.load(item + 4)
        if q_map is not None:
            tokens: gl.constexpr = _ROWS // GROUP
            q_boxes = reshaped(queries, [CONSUMERS * halves, tokens, GROUP, _HALF], rows_of_128_bytes)
            for which in gl.static_range(CONSUMERS):
                mbarrier.wait(q_free.index(which), turn & 1 ^ 1)
                mbarrier.expect(q_ready.index(which), _ROWS * PADDED * 2)
                for half in gl.static_range(halves):
                    at = [first_row // GROUP + which * tokens, head * GROUP, half * _HALF]
                    load_tile(q_map, at, q_ready.index(which), q_boxes.index(which * halves + half))
            turn += 1
        for tile in range(key_begin, key_end, BLOCK_N):
            stage = tile_of_batch % STAGES
            phase = tile_of_batch // STAGES & 1
            mbarrier.wait(free.index(stage), phase ^ 1)
            where = (tables, table, tile, key_end, head)
            _copy(k_map, k_boxes, stage, ready.index(stage), where, KV_HEADS, PADDED, PAGE, BLOCK_N)
            mbarrier.wait(free.index(STAGES + stage), phase ^ 1)
            _copy(v_map, v_boxes, stage, ready.index(STAGES + stage), where, KV_HEADS, PADDED, PAGE, BLOCK_N)
            tile_of_batch += 1


@gluon.jit
def _copy(
    source, boxes, stage, ready, where,
    KV_HEADS: gl.constexpr, PADDED: gl.constexpr, PAGE: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """A tile of keys or values: boxes of all its rows for columns 0 to 63, then for the next 64. What lies past the end
    is the last page once more: nobody looks at it, but its bytes are waited for."""
    tables, table, tile, key_end, head = where
    tall: gl.constexpr = boxes.shape[1]
    height: gl.constexpr = BLOCK_N // tall
    together: gl.constexpr = height if height < 2 else 2  # page numbers on their way
    mbarrier.expect(ready, BLOCK_N * PADDED * 2)
    for begin in range(0, height, together):
        rows = ()
        for i in gl.static_range(together):
            if PAGE:
                key = gl.minimum(tile + (begin + i) * tall, (key_end - 1) // tall * tall)
                rows += ((gl.load(tables + table + key // PAGE) * KV_HEADS + head) * PAGE + key % PAGE,)  # type: ignore[assignment]
            else:
                rows += (table + tile,)  # type: ignore[assignment]
        for half in gl.static_range(PADDED // _HALF):
            for i in gl.static_range(together):
                box = boxes.index((stage * (PADDED // _HALF) + half) * height + begin + i)
                load_tile(source, [rows[i], 0 if PAGE else head, half * _HALF], ready, box)


@gluon.jit
def _consume(
    memory, batch, q, results, which: gl.constexpr, LOAD_QUERIES: gl.constexpr,
    GROUP: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr, PADDED: gl.constexpr, BLOCK_N: gl.constexpr,
    SPLIT: gl.constexpr, WINDOWED: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    queries, keys, values, before, ready, free, q_ready, q_free, cleaned = memory
    items, counts, _, last_keys, num_tokens, factor, window = batch
    out, lse, sums, softmaxes = results
    dtype: gl.constexpr = keys.dtype
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    of_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PADDED, 16])
    of_weights: gl.constexpr = gl.DotOperandLayout(0, of_sums, 2)
    rows: gl.constexpr = gl.SliceLayout(1, of_scores)
    query_tile = queries.index(which)
    if CONSUMERS == 2:
        run_tile = before.index(which)
    place = gl.arange(0, _ROWS, rows)
    no_scores = gl.full([_ROWS, BLOCK_N], 0.0, gl.float32, of_scores)
    count = 0  # tiles of the items before
    turn = 0
    cleanings = 0
    for work in range(gl.program_id(0), gl.load(counts + 2 - CONSUMERS) * KV_HEADS, gl.num_programs(0)):
        item = items + work // KV_HEADS * _ITEM
        head = work % KV_HEADS
        key_begin, key_end, seen_begin, seen_end = (
            gl.load(item + 3), gl.load(item + 4), gl.load(item + 5), gl.load(item + 6)
        )  # fmt: skip
        token, row, here = _rows_of(item, place, head, num_tokens, which, GROUP, KV_HEADS)
        last = gl.load(last_keys + token, mask=here, other=-1)
        if LOAD_QUERIES:
            _load_queries(query_tile, q, item, head, num_tokens, which, GROUP, KV_HEADS, DIM)
        else:
            mbarrier.wait(q_ready.index(which), turn & 1)
        stage = count % STAGES
        phase = count // STAGES & 1
        mbarrier.wait(ready.index(stage), phase)
        s = hopper.warpgroup_mma(query_tile, keys.index(stage).permute((1, 0)), no_scores, use_acc=False, is_async=True)
        s = hopper.warpgroup_mma_wait(0, (s,))
        mbarrier.arrive(free.index(stage))
        if (key_begin < seen_begin) | (key_begin + BLOCK_N > seen_end):
            s = _masked(s, key_begin, last, window, WINDOWED)
        part_max = gl.full([_ROWS], NO_SCORE, gl.float32, rows)
        part_sum = gl.full([_ROWS], 0.0, gl.float32, rows)
        run_max, run_sum = part_max, part_sum
        folded = False
        part_acc = gl.full([_ROWS, PADDED], 0.0, gl.float32, of_sums)
        p, a, part_max, part_sum = _softmax(s, part_max, part_sum, factor)
        p = gl.convert_layout(p.to(dtype), of_weights)
        mbarrier.wait(ready.index((count + 1) % STAGES), (count + 1) // STAGES & 1, pred=key_begin + BLOCK_N < key_end)
        for tile in range(key_begin + BLOCK_N, key_end, BLOCK_N):
            next_stage = (count + 1) % STAGES
            s = hopper.warpgroup_mma(
                query_tile, keys.index(next_stage).permute((1, 0)), no_scores, use_acc=False, is_async=True
            )
            part_acc = part_acc * gl.convert_layout(a, gl.SliceLayout(1, of_sums))[:, None]
            mbarrier.wait(ready.index(STAGES + stage), phase)
            part_acc = hopper.warpgroup_mma(p, values.index(stage), part_acc, is_async=True)
            s = hopper.warpgroup_mma_wait(1, (s,))
            mbarrier.arrive(free.index(next_stage))
            if (tile < seen_begin) | (tile + BLOCK_N > seen_end):
                s = _masked(s, tile, last, window, WINDOWED)
            split_max, split_sum = part_max, part_sum
            begins = tile % SPLIT == 0
            if CONSUMERS == 2:
                part_max = gl.where(begins, NO_SCORE, part_max)
                part_sum = gl.where(begins, 0.0, part_sum)
            next_p, a, part_max, part_sum = _softmax(s, part_max, part_sum, factor)
            next_p = gl.convert_layout(next_p.to(dtype), of_weights)
            # The next tile's keys are waited for here so that a branch parts the softmax from the wait for the product:
            # ptxas would have all of it wait. For the same reason it is given to the wait.
            mbarrier.wait(ready.index((count + 2) % STAGES), (count + 2) // STAGES & 1, pred=tile + BLOCK_N < key_end)
            part_acc, p, next_p = hopper.warpgroup_mma_wait(0, (part_acc, p, next_p))
            mbarrier.arrive(free.index(STAGES + stage))
            if CONSUMERS == 2:  # noqa: SIM102 - one is of the compiler, one of the batch
                if begins:
                    if folded:
                        run_max, run_sum, part_acc = _fold(
                            run_max, run_sum, run_tile.load(of_sums), split_max, split_sum, part_acc
                        )
                    else:
                        run_max, run_sum = split_max, split_sum
                    folded = True
                    run_tile.store(part_acc)
                    part_acc = gl.full([_ROWS, PADDED], 0.0, gl.float32, of_sums)
            p = next_p
            count += 1
            stage = next_stage
            phase = count // STAGES & 1
        if not LOAD_QUERIES:
            mbarrier.arrive(q_free.index(which))
        part_acc = part_acc * gl.convert_layout(a, gl.SliceLayout(1, of_sums))[:, None]
        mbarrier.wait(ready.index(STAGES + stage), phase)
        if key_end % BLOCK_N != 0:
            _clean(values, stage, key_end % BLOCK_N, which, CONSUMERS)
            mbarrier.arrive(cleaned.index(0))
            mbarrier.wait(cleaned.index(0), cleanings & 1)
            cleanings += 1
        part_acc = hopper.warpgroup_mma(p, values.index(stage), part_acc, is_async=True)
        part_acc, p = hopper.warpgroup_mma_wait(0, (part_acc, p))
        mbarrier.arrive(free.index(STAGES + stage))
        count += 1
        turn += 1  # noqa: SIM113
        # Read and reckoned once more: what lives through the loop above takes registers there.
        part = gl.load(item + 7)
        token, row, here = _rows_of(item, place, head, num_tokens, which, GROUP, KV_HEADS)
        columns = gl.arange(0, PADDED, gl.SliceLayout(0, of_sums))[None, :]
        inside = gl.convert_layout(here, gl.SliceLayout(1, of_sums))[:, None] & (columns < DIM)
        if part >= 0:
            slot = row + (part - gl.load(item) // GROUP) * (GROUP * KV_HEADS)
            at = gl.convert_layout(slot, gl.SliceLayout(1, of_sums)).to(gl.int64)[:, None] * DIM + columns
            gl.store(sums + at, part_acc, mask=inside)
            gl.store(softmaxes + slot * 2, part_max, mask=here)
            gl.store(softmaxes + slot * 2 + 1, part_sum, mask=here)
        else:
            if CONSUMERS == 2:  # noqa: SIM102
                if folded:
                    part_max, part_sum, part_acc = _fold(
                        run_max, run_sum, run_tile.load(of_sums), part_max, part_sum, part_acc
                    )
            divisor = gl.where(part_sum > 0, part_sum, 1.0)
            inverse = gl.div_rn(gl.full([_ROWS], 1.0, gl.float32, rows), divisor)
            result = part_acc * gl.convert_layout(inverse, gl.SliceLayout(1, of_sums))[:, None] + 0.0
            at = gl.convert_layout(row, gl.SliceLayout(1, of_sums)).to(gl.int64)[:, None] * DIM + columns
            gl.store(out + at, result.to(dtype), mask=inside)
            if lse is not None:
                gl.store(lse + row, part_max + gl.log2(divisor), mask=here)


@gluon.jit
def _rows_of(
    item, place, head, num_tokens, which: gl.constexpr, GROUP: gl.constexpr, KV_HEADS: gl.constexpr
):  # fmt: skip
    """The token of a consumer's rows, which row of all (token, query head) pairs each is, and whether it is there."""
    first_row, num_rows = gl.load(item) + which * _ROWS, gl.load(item + 1) - which * _ROWS
    token = (first_row + place) // GROUP
    row = token * (GROUP * KV_HEADS) + head * GROUP + (first_row + place) % GROUP  # fewer than 2**31
    return token, row, (place < num_rows) & (token < num_tokens)


@gluon.jit
def _load_queries(
    tile, q, item, head, num_tokens,
    which: gl.constexpr, GROUP: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr,
):  # fmt: skip
    """Into shared memory, zeros where there is none, by the consumer that multiplies with them."""
    width: gl.constexpr = tile.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])
    place = gl.arange(0, _ROWS, gl.SliceLayout(1, layout))
    columns = gl.arange(0, width, gl.SliceLayout(0, layout))
    _, row, here = _rows_of(item, place, head, num_tokens, which, GROUP, KV_HEADS)
    at = row.to(gl.int64)[:, None] * DIM + columns[None, :]
    values = gl.load(q + at, mask=here[:, None] & (columns < DIM)[None, :], other=0.0)
    barrier()  # all four warps have multiplied with the item before
    tile.store(values)
    hopper.fence_async_shared()
    barrier()


@gluon.jit
def _clean(values, stage, number, which: gl.constexpr, CONSUMERS: gl.constexpr):
    """Zeros for the rows of a tile of values from row `number` on, which belong to nobody here and may hold anything,
    NaN too; of two consumers each writes every other block of 16 rows and 64 columns."""
    blocks: gl.constexpr = values.shape[1] // 16 * (values.shape[2] // _HALF)
    tall: gl.constexpr = values.shape[1] // 16
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows_of_128_bytes: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    every = reshaped(values, [values.shape[0] * blocks, 16, _HALF], rows_of_128_bytes)
    place = gl.arange(0, 16, gl.SliceLayout(1, layout))[:, None]
    for i in range(which, blocks, CONSUMERS):
        first = i % tall * 16
        if first + 16 > number:
            block = every.index(stage * blocks + i)
            there = block.load(layout)
            block.store(gl.where(first + place < number, there, gl.full([16, _HALF], 0.0, values.dtype, layout)))
    hopper.fence_async_shared()


@gluon.jit
def _columns(s):
    """0, 1, .. in the layout of the scores `s`. A thread has two of the first eight columns, and those 8, 16, .. after.
    A compiler that sees so keeps all of them in registers throughout, 32 that are not there; so the first two pass
    through assembly."""
    number: gl.constexpr = s.shape[1]
    eights: gl.constexpr = number // 8
    layout: gl.constexpr = _in_eights(number)
    first = gl.arange(0, 8, gl.SliceLayout(0, layout))
    first = gl.inline_asm_elementwise("mov.u32 $0, $1;", "=r,r", [first], dtype=gl.int32, is_pure=False, pack=1)
    column = first[None, :] + gl.arange(0, eights, gl.SliceLayout(1, layout))[:, None] * 8
    return gl.convert_layout(column.reshape([number]), gl.SliceLayout(0, s.type.layout), assert_trivial=True)


@gluon.jit
def _masked(s, tile, last, window, WINDOWED: gl.constexpr):
    """-inf where the row does not see the key."""
    column = _columns(s)
    if WINDOWED:  # from 0 to window - 1 keys back; keys to come are more than 2**31 back, unsigned
        seen = ((last - tile)[:, None] - column[None, :]).to(gl.uint32) < window.to(gl.uint32)
    else:
        seen = column[None, :] <= (last - tile)[:, None]
    return gl.where(seen, s, float("-inf"))


@gluon.jit
def _softmax(s, part_max, part_sum, factor):
    """p, what the sums so far are multiplied by, and the new maximum and sum."""
    zeros = gl.full(s.shape, 0.0, gl.float32, s.type.layout)
    top = gl.maximum(part_max, gl.max(s, 1) * factor)
    p = gl.exp2(gl.fma(s, factor + zeros, -top[:, None] + zeros))
    a = gl.exp2(part_max - top)
    return p, a, top, gl.fma(part_sum, a, gl.sum(p, 1))


@gluon.jit
def _fold(run_max, run_sum, run_acc, part_max, part_sum, part_acc):
    """Folds what a later split came to into what the ones before it came to."""
    rows: gl.constexpr = gl.SliceLayout(1, part_acc.type.layout)
    top = gl.maximum(run_max, part_max)
    a, b = gl.exp2(run_max - top), gl.exp2(part_max - top)
    zeros = gl.full(part_acc.shape, 0.0, gl.float32, part_acc.type.layout)
    return (
        top,
        gl.fma(run_sum, a, part_sum * b),
        gl.fma(run_acc, gl.convert_layout(a, rows)[:, None] + zeros, part_acc * gl.convert_layout(b, rows)[:, None]),
    )
