"""One token per row on a GPU, by inversion: a uniform number times the kept mass, walked along the ids in order.

A row without filters costs one reading of its logits, by the programs of `row_statistics`, and one tile more: the
tile in which the token lies. A row with filters needs what sorting would tell: which logit is the k-th, and at which
one the likelier ones reach a mass. Each is found by bisection over the logits' bits, with a reading of the row, which
then lies in the cache, for each halving, until the set is the one sought: 10 to 27 readings for 131,072 normal logits.
Masses are summed there as whole multiples of 2^-43, so a sum has no order and the set is exact. Nothing is sorted.

# R rows, V vocabulary
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.errors import InputError
from engine.kernels.graph import empty
from engine.kernels.triton.launch import aligned, launch
from engine.kernels.triton.softmax_row import (
    TILE,
    fold_width,
    load_tiles,
    logprob_of,
    row_statistics,
    scale_of,
    shift_of,
)

_LARGEST_VOCABULARY = 1 << 19
_UNIT = tl.constexpr(2.0**43)  # of fixed-point masses: 2^19 tokens as likely as the likeliest make 2^62
_LOWEST_KEY = tl.constexpr(-(2**31))
_HIGHEST_KEY = tl.constexpr(2**31 - 1)
_HEAVIEST = tl.constexpr(2**62)  # more than any token


def forward(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, counter: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `engine.kernels.sample_token.sample_token`. Raises InputError for a vocabulary over 2^19."""
    rows, vocab = logits.shape
    if vocab > _LARGEST_VOCABULARY:
        raise InputError(f"logits are of {vocab} ids; this kernel sums the masses of {_LARGEST_VOCABULARY} at most")
    logits = aligned(logits)
    tokens, logprobs, kept_mass = (empty((rows,), each, logits.device) for each in (torch.int32, *[torch.float32] * 2))
    by_tile, by_row = row_statistics(logits, None, temperature)
    inputs = (logits, temperature, top_k, top_p, min_p, seed, counter, by_tile, by_row)
    outputs, sizes = (tokens, logprobs, kept_mass), (vocab, by_tile.shape[1])
    launch(_sample, (rows,), *inputs, *outputs, *sizes, FOLD=fold_width(by_tile), num_warps=8)
    return tokens, logprobs, kept_mass


@triton.jit
def _sample(
    logits, temperature, top_k, top_p, min_p, seed, counter, by_tile, by_row, tokens, logprobs, kept_mass, vocab,
    tiles, FOLD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab
    scale = scale_of(None, temperature, row)
    largest, sums, _ = load_tiles(by_tile, row, tiles, FOLD)
    total, whole = tl.load(by_row + 4 * row + 1), tl.load(by_row + 4 * row).to(tl.float32)
    k, p, m = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
    token = tl.full([], -1, tl.int32)
    kept = tl.full([], float("nan"), tl.float32)
    if total > 0.0:  # not so where it is NaN: a NaN or +inf among the logits, or nothing but -inf
        kept = tl.full([], 1.0, tl.float32)
        if tl.load(temperature + row) == 0.0:
            token = _likeliest(logits, scale, vocab, largest, whole, FOLD)
        else:
            number = _uniform(tl.load(seed + row), tl.load(counter + row))
            if ((k > 0) & (k < vocab)) | (p < 1.0) | (m > 0.0):
                token, mass = _draw_filtered(logits, scale, vocab, tiles, whole, k, p, m, number)
                kept = tl.minimum(1.0, (mass / (total * _UNIT)).to(tl.float32))
            else:
                token = _draw(logits, scale, vocab, largest, sums, whole, total, number, FOLD)
    z = tl.load(logits + token, mask=token >= 0, other=float("nan")) * scale
    tl.store(tokens + row, token)
    tl.store(logprobs + row, logprob_of(z, whole.to(tl.float64), tl.load(by_row + 4 * row + 3)))
    tl.store(kept_mass + row, kept)


# ---- the uniform number: `hash_seed(seed, counter)`, its upper 53 bits ----


@triton.jit
def _uniform(seed, counter):
    mixed = _mix(_mix(seed.to(tl.uint64)) ^ counter.to(tl.uint64))
    return (mixed >> 11).to(tl.int64).to(tl.float64) * (2.0**-53)


@triton.jit
def _mix(x):
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


# ---- rows without filters ----


@triton.jit
def _likeliest(logits, scale, vocab, largest, whole, FOLD: tl.constexpr):
    """The smallest id of those whose z is the row's maximum."""
    tile = tl.min(tl.where(largest == whole, tl.arange(0, FOLD), FOLD), axis=0)
    ids, z = _load(logits, scale, vocab, tile)
    return tl.min(tl.where(z == whole, ids, vocab), axis=0)


@triton.jit
def _draw(logits, scale, vocab, largest, sums, whole, total, number, FOLD: tl.constexpr):
    """First the tile, then the id in it; where rounding leaves none, the last one that has any mass."""
    tile = tl.arange(0, FOLD)
    factor = tl.exp(largest - whole).to(tl.float64)
    masses = sums.to(tl.float64) * factor
    target = number * total
    chosen = _first_above(masses, tl.cumsum(masses, axis=0), target, tile, FOLD)
    before = tl.sum(tl.where(tile < chosen, masses, 0.0), axis=0)
    shift = shift_of(tl.max(tl.where(tile == chosen, largest, float("-inf")), axis=0))
    rest = (target - before) / tl.sum(tl.where(tile == chosen, factor, 0.0), axis=0)
    ids, z = _load(logits, scale, vocab, chosen)
    e = tl.exp(z - shift).to(tl.float64)
    return _first_above(e, tl.cumsum(e, axis=0), rest, ids, vocab)


@triton.jit
def _first_above(terms, cumulative, target, index, end):
    """The first index, of ascending ones under `end`, at which a positive term brings the sum above the target."""
    found = tl.min(tl.where((cumulative > target) & (terms > 0.0), index, end), axis=0)
    last = tl.max(tl.where(terms > 0.0, index, 0), axis=0)
    return tl.where(found < end, found, last)


# ---- rows with filters ----
# What a row may draw is a prefix of the order "larger z first, then smaller id". It is named by its last token's key
# and id: kept is who has a larger key, or that key and no larger id.


@triton.jit
def _draw_filtered(logits, scale, vocab, tiles, whole, k, p, m, number):
    """The token, and the mass of all that were kept in units of 2^-43 of the likeliest, as float64."""
    row = (logits, scale, vocab, tiles, whole)
    cut_key, cut_id, length = tl.full([], _LOWEST_KEY, tl.int32), vocab, vocab
    if m > 0.0:
        length, cut_key = _near(row, tl.maximum(-tl.log(m.to(tl.float64)), 0.0).to(tl.float32))
    if (k > 0) & (k < length):
        cut_key, cut_id = _cut_count(row, cut_key, cut_id, k)
    _, mass, _, _ = _measure(row, cut_key, cut_id, cut_key, True)
    if p < 1.0:
        needed = tl.maximum(tl.ceil(p.to(tl.float64) * mass.to(tl.float64)).to(tl.int64), 1)
        cut_key, cut_id, mass = _cut_mass(row, cut_key, cut_id, needed)
    target = tl.minimum((number * mass.to(tl.float64)).to(tl.int64), mass - 1)
    return _walk(row, cut_key, cut_id, target), mass.to(tl.float64)


@triton.jit
def _near(row, limit):
    """How many tokens have max - z <= limit, and the smallest of their keys."""
    logits, scale, vocab, tiles, whole = row
    count = tl.zeros([TILE], tl.int32)
    lowest = tl.full([TILE], _HIGHEST_KEY, tl.int32)
    for tile in tl.range(0, tiles, num_stages=3):
        ids, z = _load(logits, scale, vocab, tile)
        near = (whole - z <= limit) & (ids < vocab)
        count += near.to(tl.int32)
        lowest = tl.minimum(lowest, tl.where(near, _key(z), _HIGHEST_KEY))
    return tl.sum(count, axis=0), tl.min(lowest, axis=0)


@triton.jit
def _cut_count(row, cut_key, cut_id, k):
    """The prefix cut to k tokens, of which it has more."""
    low, high = cut_key.to(tl.int64), _key(row[4]).to(tl.int64)
    while low < high:  # at least k have a key of at least `low`
        middle = low + ((high - low + 1) >> 1)
        count, _, _, _ = _measure(row, cut_key, cut_id, middle.to(tl.int32), False)
        low = tl.where(count >= k, middle, low)
        high = tl.where(count > k, high, tl.where(count == k, middle, middle - 1))
    key = low.to(tl.int32)
    above, _, _, _ = _measure(row, cut_key, cut_id, key + 1, False)
    return key, _id_of_tie(row, key, k - above)


@triton.jit
def _cut_mass(row, cut_key, cut_id, needed):
    """The shortest prefix of the prefix that has this mass, and its mass."""
    low, high = cut_key.to(tl.int64), _key(row[4]).to(tl.int64)
    while low < high:  # those with a key of at least `low` have enough
        middle = low + ((high - low + 1) >> 1)
        _, mass, lightest, lowest = _measure(row, cut_key, cut_id, middle.to(tl.int32), True)
        enough = mass >= needed
        tight = enough & (mass - lightest < needed)  # and without the last of them they have not
        low = tl.where(tight, lowest.to(tl.int64), tl.where(enough, middle, low))
        high = tl.where(tight, lowest.to(tl.int64), tl.where(enough, high, middle - 1))
    key = low.to(tl.int32)
    tied, mass, _, _ = _measure(row, cut_key, cut_id, key, True)
    fewer, above, _, _ = _measure(row, cut_key, cut_id, key + 1, True)
    each = (mass - above) // (tied - fewer)  # of those with that key; no other's, for exp need not be monotonic
    ties = (needed - above + each - 1) // each
    return key, _id_of_tie(row, key, ties.to(tl.int32)), above + ties * each


@triton.jit
def _measure(row, cut_key, cut_id, key, MASS: tl.constexpr):
    """Of the prefix's tokens with a key of at least `key`: how many, their mass, the lightest's, the lowest key."""
    logits, scale, vocab, tiles, whole = row
    count = tl.zeros([TILE], tl.int32)
    mass = tl.zeros([TILE], tl.int64)
    lightest = tl.full([TILE], _HEAVIEST, tl.int64)
    lowest = tl.full([TILE], _HIGHEST_KEY, tl.int32)
    for tile in tl.range(0, tiles, num_stages=3):
        ids, z = _load(logits, scale, vocab, tile)
        at = _key(z)
        held = _kept(ids, at, vocab, cut_key, cut_id) & (at >= key)
        count += held.to(tl.int32)
        if MASS:
            each = _mass(z, whole)
            mass += tl.where(held, each, 0)
            lightest = tl.minimum(lightest, tl.where(held, each, _HEAVIEST))
            lowest = tl.minimum(lowest, tl.where(held, at, _HIGHEST_KEY))
    return tl.sum(count, axis=0), tl.sum(mass, axis=0), tl.min(lightest, axis=0), tl.min(lowest, axis=0)


@triton.jit
def _id_of_tie(row, key, number):
    """The id of the number-th token with this key, counted from 1; -1 for number 0."""
    logits, scale, vocab, tiles, _ = row
    seen = tl.zeros([], tl.int32)
    found = tl.full([], -1, tl.int32)
    for tile in tl.range(0, tiles, num_stages=3):
        ids, z = _load(logits, scale, vocab, tile)
        tie = ((_key(z) == key) & (ids < vocab)).to(tl.int32)
        ties = tl.sum(tie, axis=0)
        if (seen < number) & (seen + ties >= number):
            found = tl.max(tl.where((tie > 0) & (tl.cumsum(tie, axis=0) == number - seen), ids, -1), axis=0)
        seen += ties
    return found


@triton.jit
def _walk(row, cut_key, cut_id, target):
    """The first id at which the kept mass goes above the target."""
    logits, scale, vocab, tiles, whole = row
    seen = tl.zeros([], tl.int64)
    token = tl.full([], -1, tl.int32)
    for tile in tl.range(0, tiles, num_stages=3):
        ids, z = _load(logits, scale, vocab, tile)
        each = tl.where(_kept(ids, _key(z), vocab, cut_key, cut_id), _mass(z, whole), 0)
        mass = tl.sum(each, axis=0)
        if (token < 0) & (seen + mass > target):
            token = tl.min(tl.where(seen + tl.cumsum(each, axis=0) > target, ids, vocab), axis=0)
        seen += mass
    return token


@triton.jit
def _load(logits, scale, vocab, tile):
    ids = tile * TILE + tl.arange(0, TILE)
    return ids, tl.load(logits + ids, mask=ids < vocab, other=float("-inf")) * scale


@triton.jit
def _key(z):
    """An int32 in the order of the floats; -0 counts as 0."""
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _kept(ids, key, vocab, cut_key, cut_id):
    return (ids < vocab) & ((key > cut_key) | ((key == cut_key) & (ids <= cut_id)))


@triton.jit
def _mass(z, whole):
    return (tl.exp(z - whole) * _UNIT).to(tl.int64)
