"""Threads of a block, and the register files that instructions see them through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tests.ptx.block import Block

WARP = 32
# The types that each register file is seen as, the one it is made of first.
VIEWS: dict[str, dict[str, Any]] = {
    "pred": {"pred": np.bool_},
    "b16": {"u16": np.uint16, "s16": np.int16, "f16": np.float16},
    "b32": {"u32": np.uint32, "s32": np.int32, "f32": np.float32},
    "b64": {"u64": np.uint64, "s64": np.int64, "f64": np.float64},
}


class _Gathered:
    """Rows of a register file at some threads that do not lie side by side."""

    def __init__(self, table: NDArray, index: NDArray[np.intp]) -> None:
        self.table, self.index = table, index

    def __getitem__(self, row: int) -> NDArray:
        return self.table[row][self.index]


class Threads:
    """Threads of one block that are at one instruction: whole warps side by side, unless the program diverged or the
    instruction is predicated.

    `count` of them; `index` their numbers in the block, sorted; `select` a slice or an index, for arrays over the
    block's threads; `together`: side by side; `whole`: whole warps side by side, whose values reshape to [warps, 32].
    `threads.f32[i]` is row i of the 32-bit registers as floats (also u32 s32 u64 s64 f64 u16 s16 f16 pred): the
    registers themselves where the threads lie side by side, else a copy.
    """

    def __init__(self, block: Block, index: NDArray[np.intp]) -> None:
        self.block, self.index, self.count = block, index, len(index)
        self.low, self.high = int(index[0]), int(index[-1]) + 1
        self.together = self.high - self.low == self.count
        self.whole = self.together and self.low % WARP == 0 and self.high % WARP == 0
        self.select: Any = slice(self.low, self.high) if self.together else index

    def __getattr__(self, name: str) -> Any:
        """Made when it is first asked for."""
        table = self.block.views.get(name)
        if table is None:
            raise AttributeError(name)
        rows = list(table[:, self.select]) if self.together else _Gathered(table, self.index)
        setattr(self, name, rows)
        return rows

    def where(self, mask: NDArray[np.bool_]) -> Threads:
        """Those at which the mask [count] holds, which must be some."""
        return self.block.threads(self.index[mask])

    def warps(self) -> Iterator[Threads]:
        """Those of each warp."""
        warp = self.index // WARP
        for each in np.unique(warp):
            yield self.block.threads(self.index[warp == each])


def full(values: NDArray, threads: Threads) -> NDArray:
    """[count] of what a reader gave."""
    return values if len(values) == threads.count else np.broadcast_to(values, (threads.count,))
