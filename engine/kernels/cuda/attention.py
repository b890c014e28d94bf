"""Attention with its decode in CUDA C++ (csrc/cuda/attention.cu): sequences of few rows, against pages. All else, and
what comes before, is Triton's; both do the same arithmetic on the same work lists.

# T tokens, H query heads, K key/value heads, Dh head width
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from engine.errors import InputError
from engine.kernels.attention_call import AttentionCall
from engine.kernels.attention_pages import AttentionSpec
from engine.kernels.op import cuda_extension
from engine.kernels.triton import attention as triton_attention
from engine.kernels.triton.attention_plan import DevicePlan
from engine.kernels.triton.attention_work import Tiles, WorkLists

HEAD_DIMS = (64, 96, 128, 256)
ROWS = 16  # of a tile: (new token, query head) pairs that share a key/value head
_TREE_SUMS_SINCE = (3, 7)  # Triton 3.6 adds up in sequence within a thread, 3.9 as a tree

backward = triton_attention.backward


def missing() -> str:
    """Why it cannot run on this GPU; empty where it can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    return "" if major == 9 else f"it sums as Triton does on compute capability 9; this GPU has {major}.{minor}"


def forward(call: AttentionCall, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    """See `AttentionCall`. Batches without pages, and those whose `lse` is wanted, are training's: they run on Triton
    alone, and so do head widths that the CUDA kernels lack."""
    if call.keys is None or want_lse or call.spec.head_dim not in HEAD_DIMS:
        return triton_attention.forward(call, want_lse)
    tiles = replace(triton_attention.tiles_of(call.spec, call.qkv.dtype, call.qkv.device), decode_m=ROWS)
    return triton_attention.forward(call, want_lse, tiles=tiles, decode=decode)


def decode(q: Tensor, keys: Tensor, values: Tensor, out: Tensor, sums: Tensor, softmaxes: Tensor, spec: AttentionSpec,
           plan: DevicePlan, lists: WorkLists, tiles: Tiles) -> None:  # fmt: skip
    """Fills the rows of `out` [T, H Dh] that `lists.decode` names, then folds all partial results: those that Triton
    left in `sums` [.., H, Dh] and `softmaxes` [.., H, 2] too. `q` [T, H, Dh] is rotated; all are on one CUDA device.
    Rows that the lists name past T, of a plan that holds a larger batch, are left alone.

    Raises InputError for what the kernels do not take, before anything is launched.
    """
    if not (lists.num_decode or lists.num_turns or plan.fixed):
        return
    has_turns = bool(lists.num_turns) or plan.fixed
    lists_of = (lists.decode, lists.counts, lists.turns, lists.parts, plan.tables, plan.last_keys)
    tensors = (q, keys, values, *lists_of, out, sums, softmaxes)
    heads = (spec.num_heads, spec.num_kv_heads, spec.head_dim)
    shape = (q.shape[0], *heads, plan.page_size, spec.window or 0, tiles.decode_m, tiles.block_n, tiles.split)
    types = (_code(q.dtype), _code(keys.dtype))
    factor = spec.scale * math.log2(math.e)
    try:
        with torch.cuda.device_of(q):
            cuda_extension().attention_decode(
                *(tensor.data_ptr() for tensor in tensors), types, shape, factor, _tree_sums(), has_turns,
                _stream(q.device),
            )  # fmt: skip
    except ValueError as error:
        raise InputError(str(error)) from None


def _code(dtype: torch.dtype) -> int:
    """As csrc/cuda/attention.h numbers types; 0 for those it has none for."""
    extension = cuda_extension()
    codes = {torch.bfloat16: extension.BFLOAT16, torch.float16: extension.FLOAT16, torch.float8_e4m3fn: extension.E4M3}
    return codes.get(dtype, 0)


@cache
def _tree_sums() -> bool:
    """How the Triton beside us adds up what a thread has of a row: as a tree, or in sequence."""
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) >= _TREE_SUMS_SINCE


def _stream(device: torch.device) -> int:
    """The handle of torch's current stream; 0, the default one, where there is no GPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
