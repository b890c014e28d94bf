"""flash-attn, the package, beside ours: version 2 (`flash_attn`) and version 3, for Hopper (`flash_attn_interface`).

Neither is required. Both take [S, T, H, Dh] in 16 bits, on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

MODULES = {"flash-attn 2": "flash_attn", "flash-attn 3": "flash_attn_interface"}


@dataclass(frozen=True)
class FlashAttention:
    """One version: its functions, as its module has them."""

    name: str
    attend: Callable[..., Any]
    attend_cache: Callable[..., Any]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of [S, T, H, Dh] over [S, T, K, Dh], which has a gradient."""
        out = self.attend(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out  # releases of version 3 before 2025 give the lse too

    def decode(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        """[S, 1, H, Dh] against all of [S, T, K, Dh], a cache in one piece: no page tables to follow. `lengths` is
        int32 [S], of the caches."""
        out = self.attend_cache(q, k, v, cache_seqlens=lengths, causal=True)
        return out[0] if isinstance(out, tuple) else out


def flash_attentions(dtype: torch.dtype) -> tuple[list[FlashAttention], list[str]]:
    """Those that can be imported, and a line for each that cannot be measured. What is not there is not imported."""
    found, notes = [], []
    for name, module in MODULES.items():
        if find_spec(module) is None:
            notes.append(f"{name} is not installed")
        elif dtype not in (torch.float16, torch.bfloat16):
            notes.append(f"{name} has no {str(dtype).removeprefix('torch.')}")
        else:
            try:
                loaded = import_module(module)
                functions = loaded.flash_attn_func, loaded.flash_attn_with_kvcache
            except (ImportError, OSError, AttributeError) as error:  # built for another torch or CUDA, as a rule
                notes.append(f"{name} cannot be imported: {' '.join(str(error).split())[:200]}")
                continue
            found.append(FlashAttention(f"{name} {getattr(loaded, '__version__', '')}".strip(), *functions))
    return found, notes
