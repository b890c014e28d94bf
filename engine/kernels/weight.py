"""A weight of the model: the only copy of one matrix or vector, in the layout that the kernels read."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from engine.errors import InputError
from engine.kernels.dtypes import KERNEL_DTYPES as DTYPES
from engine.kernels.dtypes import MODEL_DTYPES, wide_dtype
from engine.kernels.memory import zeros
from engine.kernels.op import cpu_layout, extension

PANEL = 16  # rows of a packed panel
_CHUNK_ROWS = 4096  # rows converted at a time when a source dtype needs a detour through fp32


class Weight:
    """One matrix [N, K] or vector [N], stored once in `data`.

    A packed matrix lies in panels of 16 rows: fp32 [ceil(N/16), K, 16], bf16 [ceil(N/16), ceil(K/2), 16, 2], where
    rows past N and the column past an odd K are zero. Anything else is dense, and so is every weight in float64 or
    for other kernels than the C++ ones (`packed` is then False whatever was asked for). It lies on the device that is
    torch's default when it is made, and its gradient with it. `grad` is fp32 (float64 for a
    float64 weight) and dense, or None before the first gradient; kernels add to it in place. `decay` says whether the
    optimizer's weight decay applies.

    Made uninitialised in value (zeros); raises InputError for a dtype or shape that has no layout.
    """

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, packed: bool, decay: bool = True) -> None:
        if dtype not in MODEL_DTYPES.values():
            raise InputError(f"weight {name} is {dtype}; weights are {', '.join(map(str, MODEL_DTYPES.values()))}")
        if len(shape) not in (1, 2) or min(shape) < 1:
            raise InputError(f"weight {name} has shape {tuple(shape)}; a weight is a matrix [N, K] or a vector [N]")
        if packed and len(shape) != 2:
            raise InputError(f"weight {name} has shape {tuple(shape)}; only a matrix [N, K] can be packed")
        self.name = name
        self.shape = tuple(shape)
        self.dtype = dtype
        self.packed = packed and dtype in DTYPES and cpu_layout()
        self.decay = decay
        self.data = zeros(storage_shape(self.shape, dtype, self.packed), dtype)
        self.grad: Tensor | None = None
        self._grad_source: tuple[Weight, int] | None = None  # whose gradient a slice shares, and from which row on
        self._lanes: list[Weight] = []  # see `lane`: those after the first

    def __repr__(self) -> str:
        layout = "packed" if self.packed else "dense"
        return f"Weight({self.name!r}, {self.shape}, {self.dtype}, {layout})"

    @property
    def nbytes(self) -> int:
        """Bytes of the storage, padding included."""
        return self.data.numel() * self.data.element_size()

    def load_(self, dense: Tensor, row: int = 0) -> None:
        """Writes rows [row, row + len(dense)) in place, rounding to the nearest value of `dtype` (ties to even).

        `dense` is [rows, K], or [rows] for a vector, of any floating dtype, on the CPU or the weight's device. Raises
        InputError when it does not fit.
        """
        if not dense.is_floating_point():
            raise InputError(f"weight {self.name} cannot be loaded from {dense.dtype}; give a floating dtype")
        if dense.dim() != len(self.shape) or dense.shape[1:] != self.shape[1:]:
            raise InputError(f"weight {self.name} is {self.shape}; a tensor {tuple(dense.shape)} has no rows for it")
        self._check_rows(row, dense.shape[0])
        if not self.packed:
            self.data[row : row + dense.shape[0]].copy_(dense)
        elif dense.dtype not in DTYPES:
            for begin in range(0, dense.shape[0], _CHUNK_ROWS):
                self.load_(dense[begin : begin + _CHUNK_ROWS].float(), row + begin)
        else:
            source = dense.detach() if dense.stride(1) == 1 else dense.detach().contiguous()
            extension().pack_rows(
                self.data.data_ptr(), DTYPES[self.dtype], self.shape[1], row, source.shape[0],
                source.data_ptr(), DTYPES[source.dtype], source.stride(0),
            )  # fmt: skip

    def dense(self, row: int = 0, rows: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """A copy of rows [row, row + rows) (to the end by default) as [rows, K] or [rows], in `dtype` or the weight's,
        on the weight's device.

        Raises InputError when the rows are not there.
        """
        rows = self.shape[0] - row if rows is None else rows
        self._check_rows(row, rows)
        dtype = dtype or self.dtype
        if not self.packed:
            return self.data[row : row + rows].to(dtype, copy=True)
        out = torch.empty((rows, self.shape[1]), dtype=dtype if dtype in DTYPES else torch.float32)
        extension().unpack_rows(
            self.data.data_ptr(), DTYPES[self.dtype], self.shape[1], row, rows,
            out.data_ptr(), DTYPES[out.dtype], out.stride(0),
        )  # fmt: skip
        return out.to(dtype)

    def slice(self, row: int, rows: int, share_grad: bool = False) -> Weight:
        """Rows [row, row + rows) as a weight that shares the storage: what is written to one is in the other.

        Its gradient is its own, or, with `share_grad`, those rows of this weight's. Raises InputError for rows that
        are not there or, in a packed matrix, are not whole panels of 16 (the last one may be partly filled).
        """
        self._check_rows(row, rows)
        end = row + rows
        if self.packed and (row % PANEL or (end % PANEL and end != self.shape[0])):
            raise InputError(
                f"rows [{row}, {end}) of weight {self.name} are not whole panels; a packed matrix is cut at multiples "
                f"of {PANEL}"
            )
        part = copy(self)
        part.name = self.name if rows == self.shape[0] else f"{self.name}[{row}:{end}]"
        part.shape = (rows, *self.shape[1:])
        part.data = self.data[row // PANEL : -(-end // PANEL)] if self.packed else self.data[row:end]
        part.grad, part._grad_source, part._lanes = None, (self, row) if share_grad else None, []
        return part

    def lane(self, index: int) -> Weight:
        """The same storage with gradient number `index`, for sums that are made side by side: lane 0 is the weight
        itself, the others are made on first use and stay. `zero_grad` is for all of them."""
        while len(self._lanes) < index:
            self._lanes.append(self.slice(0, self.shape[0]))
        return self._lanes[index - 1] if index else self

    def grad_buffer(self) -> Tensor:
        """`grad`, made of zeros on first use."""
        if self.grad is None and self._grad_source is not None:
            whole, row = self._grad_source
            self.grad = whole.grad_buffer()[row : row + self.shape[0]]
        if self.grad is None:
            self.grad = zeros(self.shape, wide_dtype(self.dtype), self.data.device)
        return self.grad

    def zero_grad(self) -> None:
        """Fills `grad` with zeros and keeps its memory; those of other lanes too."""
        shared = self._grad_source is not None and self._grad_source[0].grad is not None
        if self.grad is not None or shared:
            self.grad_buffer().zero_()
        for lane in self._lanes:
            lane.zero_grad()

    def _check_rows(self, row: int, rows: int) -> None:
        if row < 0 or rows < 0 or row + rows > self.shape[0]:
            raise InputError(f"weight {self.name} has {self.shape[0]} rows; [{row}, {row + rows}) is outside of it")


def storage_shape(shape: tuple[int, ...], dtype: torch.dtype, packed: bool) -> tuple[int, ...]:
    """The shape of `Weight.data`: the weight's own where it is dense, whole panels where it is packed."""
    if not packed:
        return shape
    rows, width = shape
    panels = -(-rows // PANEL)
    return (panels, -(-width // 2), PANEL, 2) if dtype == torch.bfloat16 else (panels, width, PANEL)
