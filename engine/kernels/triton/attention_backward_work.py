"""What the programs of attention's backward do: tiles of rows, and tiles of keys, each with what it has to look at.

# T tokens, G query heads that share a kv head
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import triton

if TYPE_CHECKING:
    from engine.kernels.attention import AttentionPlan


@dataclass(frozen=True)
class Tiles:
    """Rows and keys of a tile in either kernel, and how it is launched."""

    query_rows: int  # _grad_queries: rows of a program
    query_keys: int  # and keys of a step
    key_keys: int  # _grad_keys: keys of a program
    key_rows: int  # and rows of a step
    num_warps: int
    num_stages: int
    apart: bool = False  # dK and dV in a launch each, RoPE and norms in others: wide heads fill the registers
    token_rows: int = 0  # rows of a token, if not as many as query heads share a kv head


def work_lists(plan: AttentionPlan, group: int, window: int, tiles: Tiles) -> tuple[np.ndarray, np.ndarray]:
    """What the programs of both kernels do, heaviest first: int32 [n, 4] and [n, 7].

    A tile of rows: its sequence's first token and last token + 1, the tile's first row among the sequence's, the row of
    `kv` that the sequence's first key is. A tile of keys: that row, the tile's first key in the sequence, how many keys
    it has, and four tokens: the first that sees one of them, the first that is not before any of them, the first that
    the window hides one from, the first that it hides all from.
    """
    group = tiles.token_rows or group
    starts = plan.kv_plan.cu_seqlens.numpy().astype(np.int64)
    rows = plan.rows().numpy()  # the key row of each query, rising
    query_starts = np.searchsorted(rows, starts)

    step = whole_tokens(tiles.query_rows, group)
    counts = -(-np.diff(query_starts) * group // step)
    sequence, index = np.repeat(np.arange(len(counts)), counts), _counted(counts)
    first, last, row = query_starts[sequence], query_starts[sequence + 1], index * step
    highest = rows[np.minimum(first + (row + step - 1) // group, last - 1)] - starts[sequence]
    queries = np.stack([first, last, row, starts[sequence]], 1)
    queries = queries[np.argsort(-np.minimum(highest, window or highest), kind="stable")]

    counts = -(-np.diff(starts) // tiles.key_keys)
    sequence, index = np.repeat(np.arange(len(counts)), counts), _counted(counts)
    begin = starts[sequence] + index * tiles.key_keys
    end = np.minimum(begin + tiles.key_keys, starts[sequence + 1])
    first, last = query_starts[sequence], query_starts[sequence + 1]

    def bound(key: np.ndarray) -> np.ndarray:
        return np.clip(np.searchsorted(rows, key), first, last)

    seen, whole = bound(begin), bound(begin + tiles.key_keys - 1)
    cut, hidden = (bound(begin + window), bound(end - 1 + window)) if window else (last, last)
    first_key = starts[sequence]
    keys = np.stack([first_key, begin - first_key, end - begin, seen, np.minimum(whole, hidden), cut, hidden], 1)
    keys = keys[np.argsort(seen - hidden, kind="stable")]
    return queries.astype(np.int32), keys.astype(np.int32)


def _counted(counts: np.ndarray) -> np.ndarray:
    """0 .. counts[0] - 1, 0 .. counts[1] - 1, ..."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


@triton.constexpr_function
def whole_tokens(rows: int, group: int, smallest: int = 0) -> int:
    """Rows that a tile of `rows` takes: whole tokens only, where one fits the `smallest` tile that takes part."""
    return rows // group * group if group <= (smallest or rows) else rows
