"""The shape of an attention layer, and the pages that hold its keys and values.

# K key/value heads, Dh head width
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import InputError
from engine.kernels.dtypes import KERNEL_DTYPES, MODEL_DTYPES, TRITON_DTYPES, wide
from engine.kernels.memory import zeros
from engine.kernels.op import cpu_layout

BLOCK = 16  # keys of a block, as csrc/cpu/attention_plan.h has it
TEMPORARY_PAGE = 32  # page size where pages live as long as the call: a chunk of P V lies in one piece
MAX_HEAD_DIM = 256
ATTENTION_DTYPES = tuple(dict.fromkeys((*MODEL_DTYPES.values(), *TRITON_DTYPES)))
E4M3_MAX = 448.0  # the largest finite value of float8_e4m3fn


@dataclass(frozen=True)
class AttentionSpec:
    """The shape of one attention layer.

    With `window`, a query at position p sees keys p - window + 1 .. p. `scale` multiplies the scores; 0 stands for
    head_dim**-0.5. `eps` is that of the q/k norm. `kv_dtype` is what pages hold keys and values in: float8_e4m3fn, or
    None for the model's dtype. Without pages they are rounded to it all the same, so that training sees what sampling
    saw; the gradient passes straight through that rounding. Raises InputError for what the kernels do not take.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    scale: float = 0.0
    eps: float = 1e-6
    kv_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.head_dim < 16 or self.head_dim % 16 or self.head_dim > MAX_HEAD_DIM:
            raise InputError(f"head_dim is {self.head_dim}; attention takes multiples of 16 up to {MAX_HEAD_DIM}")
        if self.num_kv_heads < 1 or self.num_heads < 1 or self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_heads is {self.num_heads}; it must be a multiple of num_kv_heads ({self.num_kv_heads})"
            )
        if self.window is not None and self.window < 1:
            raise InputError(f"window is {self.window}; it must be at least 1, or None for no window")
        if self.scale < 0:
            raise InputError(f"scale is {self.scale}; it must be positive, or 0 for head_dim**-0.5")
        if self.kv_dtype not in (None, torch.float8_e4m3fn):
            raise InputError(
                f"kv_dtype is {self.kv_dtype}; it must be torch.float8_e4m3fn, or None for the model's dtype"
            )
        if not self.scale:
            object.__setattr__(self, "scale", self.head_dim**-0.5)

    @property
    def row_size(self) -> int:
        """Elements of a row of qkv: H query heads, K key heads, K value heads."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


def allocate_pages(num_pages: int, page_size: int, spec: AttentionSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Zero-filled pages for keys and values of one layer of `dtype`, each [num_pages, elements of a page].

    A page of either is [K, page_size, Dh], in panels where the C++ kernels serve (see `in_panels`); its elements are
    of `spec.kv_dtype`, or of `dtype`. Raises InputError for a page size that is no multiple of 16, or a dtype without
    kernels.
    """
    if page_size < BLOCK or page_size % BLOCK:
        raise InputError(f"page_size is {page_size}; it must be a multiple of {BLOCK}")
    if dtype not in ATTENTION_DTYPES:
        raise InputError(f"pages cannot be {dtype}; attention takes {', '.join(map(str, ATTENTION_DTYPES))}")
    dtype = spec.kv_dtype or dtype
    keys, values = (zeros((num_pages, columns), dtype) for columns in page_columns(spec, page_size, dtype))
    return keys, values


def in_panels(dtype: torch.dtype, device: str = "cpu") -> bool:
    """Whether pages of `dtype` have the layout of the C++ kernels: panels of 16 keys, and of 16 columns of values."""
    return dtype in KERNEL_DTYPES and device in ("cpu", "meta") and cpu_layout()


def page_columns(spec: AttentionSpec, page_size: int, dtype: torch.dtype, device: str = "cpu") -> tuple[int, int]:
    """Elements of a page of keys, and of one of values."""
    slots = spec.num_kv_heads * page_size
    return slots * (depth_of(spec, dtype) if in_panels(dtype, device) else spec.head_dim), slots * spec.head_dim


def depth_of(spec: AttentionSpec, dtype: torch.dtype) -> int:
    """Rows of a key panel: the head width, in bf16 padded to whole matrix instructions."""
    return -(-spec.head_dim // 32) * 32 if dtype == torch.bfloat16 else spec.head_dim


def to_page(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`x` with the values it has in pages of `dtype`, in its own dtype; None is for pages that hold it as it is.

    float8_e4m3fn rounds to the nearest (ties to even) and saturates at 448; NaN stays.
    """
    return x if dtype is None else x.clamp(-E4M3_MAX, E4M3_MAX).to(dtype).to(x.dtype)


def write_pages(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, pages: Tensor, context: int, spec: AttentionSpec,
                page_size: int) -> None:  # fmt: skip
    """Writes k and v [n, K, Dh], the last n of a sequence's `context` keys, to its `pages`."""
    page, slot = _slots(pages, context - k.shape[0], context, page_size)
    k, v = (to_page(x.detach(), spec.kv_dtype).to(keys.dtype) for x in (k, v))
    if not in_panels(keys.dtype, keys.device.type):
        shape = (-1, spec.num_kv_heads, page_size, spec.head_dim)
        for pool, x in ((keys, k), (values, v)):
            bits = torch.uint8 if pool.dtype == torch.float8_e4m3fn else pool.dtype  # torch does not index float8
            pool.view(bits).view(shape)[page, :, slot] = x.view(bits)
        return
    key_shape, value_shape = _panel_shapes(spec, page_size, keys.dtype)
    pair = key_shape[-1]
    k = torch.nn.functional.pad(k, (0, depth_of(spec, keys.dtype) - spec.head_dim))
    keys.view(key_shape)[page, :, slot // BLOCK, :, slot % BLOCK] = k.view(*k.shape[:2], key_shape[3], pair)
    values.view(value_shape)[page, :, :, slot // pair, :, slot % pair] = v.view(*v.shape[:2], value_shape[2], 16)


def read_pages(keys: Tensor, values: Tensor, pages: Tensor, context: int, spec: AttentionSpec,
               page_size: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The `context` keys and values that a sequence has in its `pages`, [context, K, Dh], in the dtype of sums."""
    page, slot = _slots(pages, 0, context, page_size)
    if not in_panels(keys.dtype, keys.device.type):
        shape = (-1, spec.num_kv_heads, page_size, spec.head_dim)
        bits = torch.uint8 if keys.dtype == torch.float8_e4m3fn else keys.dtype
        k, v = (pool.view(bits).view(shape)[page, :, slot].view(pool.dtype) for pool in (keys, values))
        return wide(k), wide(v)
    key_shape, value_shape = _panel_shapes(spec, page_size, keys.dtype)
    pair = key_shape[-1]
    k = keys.view(key_shape)[page, :, slot // BLOCK, :, slot % BLOCK].flatten(2)[..., : spec.head_dim]
    v = values.view(value_shape)[page, :, :, slot // pair, :, slot % pair].flatten(2)
    return wide(k), wide(v)


def copy_pages(pages: Tensor, source: Tensor, target: Tensor) -> None:
    """Page target[i] becomes what page source[i] is (int64 [n], on the pages' device)."""
    bits = pages.view(torch.uint8) if pages.dtype == torch.float8_e4m3fn else pages  # torch does not index float8
    bits[target] = bits[source]


def _panel_shapes(spec: AttentionSpec, page_size: int, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, ...]]:
    pair = 2 if dtype == torch.bfloat16 else 1
    keys = (-1, spec.num_kv_heads, page_size // BLOCK, depth_of(spec, dtype) // pair, BLOCK, pair)
    values = (-1, spec.num_kv_heads, spec.head_dim // 16, page_size // pair, 16, pair)
    return keys, values


def _slots(pages: Tensor, begin: int, end: int, page_size: int) -> tuple[Tensor, Tensor]:
    at = torch.arange(begin, end, device=pages.device)
    return pages.long()[at // page_size], at % page_size
