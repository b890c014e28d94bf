"""Paged attention with grouped queries: q/k norm, RoPE, the write of keys and values, and the walk over them.

One kernel serves prefill, chunked prefill, decode, scoring and training; csrc/cpu/attention.inl draws the walk.

# T tokens, S sequences, B pages per sequence, H query heads, K key/value heads, Dh head width, P positions
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.errors import InputError
from engine.kernels.dtypes import MODEL_DTYPES, wide, wide_dtype
from engine.kernels.graph import empty
from engine.kernels.memory import zeros
from engine.kernels.op import Backend, Op, cpu_backend, cpu_missing, extension
from engine.kernels.rope import apply_rope
from engine.kernels.weight import DTYPES, Weight

_BLOCK = 16  # keys of a block, as csrc/cpu/attention_plan.h has it
_MAX_HEAD_DIM = 256
_TEMPORARY_PAGE = 32  # page size where pages live as long as the call: a chunk of P V lies in one piece


@dataclass(frozen=True)
class AttentionSpec:
    """The shape of one attention layer.

    With `window`, a query at position p sees keys p - window + 1 .. p. `scale` multiplies the scores; 0 stands for
    head_dim**-0.5. `eps` is that of the q/k norm. Raises InputError for sizes the kernel does not take.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    scale: float = 0.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.head_dim < 16 or self.head_dim % 16 or self.head_dim > _MAX_HEAD_DIM:
            raise InputError(f"head_dim is {self.head_dim}; attention takes multiples of 16 up to {_MAX_HEAD_DIM}")
        if self.num_kv_heads < 1 or self.num_heads < 1 or self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_heads is {self.num_heads}; it must be a multiple of num_kv_heads ({self.num_kv_heads})"
            )
        if self.window is not None and self.window < 1:
            raise InputError(f"window is {self.window}; it must be at least 1, or None for no window")
        if self.scale < 0:
            raise InputError(f"scale is {self.scale}; it must be positive, or 0 for head_dim**-0.5")
        if not self.scale:
            object.__setattr__(self, "scale", self.head_dim**-0.5)

    @property
    def row_size(self) -> int:
        """Elements of a row of qkv: H query heads, K key heads, K value heads."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


def allocate_pages(num_pages: int, page_size: int, spec: AttentionSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Zero-filled pages for keys and values of one layer, each [num_pages, elements of a page], in the kernel's layout.

    Raises InputError for a page size that is no multiple of 16, or a dtype without kernels.
    """
    if page_size < _BLOCK or page_size % _BLOCK:
        raise InputError(f"page_size is {page_size}; it must be a multiple of {_BLOCK}")
    if dtype not in MODEL_DTYPES.values():
        raise InputError(f"pages cannot be {dtype}; attention takes {', '.join(map(str, MODEL_DTYPES.values()))}")
    size = spec.num_kv_heads * page_size
    return (
        zeros((num_pages, size * _depth(spec, dtype)), dtype),
        zeros((num_pages, size * spec.head_dim), dtype),
    )


class AttentionPlan:
    """What attention knows of a batch: whose rows are whose, where keys live, and how the work is divided.

    Built once per batch and read by every layer. A recorded graph keeps the plan and replays attention for whatever it
    holds at that time. `AttentionPlan(kv_plan)` is a plan of queries alone: some rows of `kv_plan`, which says of all
    rows where their keys live (see build_segments); without it `kv_plan` is the plan itself.
    """

    def __init__(self, kv_plan: AttentionPlan | None = None) -> None:
        self._kv_plan = kv_plan
        self.native = None if cpu_missing() else extension().AttentionPlan()
        self.version = 0  # counts builds
        self.num_tokens = 0
        self.num_pages = 0  # one more than the largest page named
        self.page_size = _BLOCK

    @classmethod
    def of_sequences(cls, lengths: Sequence[int]) -> AttentionPlan:
        """The plan of whole sequences, packed end to end, positions from 0, without a cache."""
        sizes = torch.tensor(lengths, dtype=torch.int32)
        starts = torch.zeros(len(sizes) + 1, dtype=torch.int32)
        torch.cumsum(sizes, 0, out=starts[1:])
        plan = cls()
        plan.build(starts, sizes, torch.cat([torch.arange(0), *map(torch.arange, lengths)]).int())
        return plan

    @property
    def kv_plan(self) -> AttentionPlan:
        """The plan of the rows that keys and values come from."""
        return self if self._kv_plan is None else self._kv_plan

    def build(
        self,
        cu_seqlens: Tensor | np.ndarray,
        context_lens: Tensor | np.ndarray,
        positions: Tensor | np.ndarray,
        block_tables: Tensor | np.ndarray | None = None,
        page_size: int = _TEMPORARY_PAGE,
    ) -> None:
        """Takes a batch in; everything is copied.

        Sequence s owns rows cu_seqlens[s] to cu_seqlens[s + 1] (int32 [S + 1]) and has keys 0 .. context_lens[s] - 1
        (int32 [S]), its own rows' being the last of them; a row sees the keys up to its own. `positions` (int32 [T])
        are what RoPE turns by. block_tables[s, i] (int32 [S, B]) is the page of keys i * page_size and up; None is for
        attention without a cache. Neighbouring sequences of few rows whose tables begin with the same pages have those
        read once. Raises InputError when these do not fit together.
        """
        arrays = [_int32(cu_seqlens, "cu_seqlens", 1), _int32(context_lens, "context_lens", 1),
                  _int32(positions, "positions", 1)]  # fmt: skip
        tables = None if block_tables is None else _int32(block_tables, "block_tables", 2)
        self.cu_seqlens, self.context_lens, self.positions = arrays
        self.block_tables = tables
        num_seqs, num_tokens = self.context_lens.shape[0], self.positions.shape[0]
        if self.cu_seqlens.shape[0] != num_seqs + 1 or int(self.cu_seqlens[-1]) != num_tokens:
            raise InputError(
                f"a plan of {num_seqs} context_lens and {num_tokens} positions needs cu_seqlens of {num_seqs + 1} that "
                f"end at {num_tokens}; it has {self.cu_seqlens.shape[0]} that end at {int(self.cu_seqlens[-1])}"
            )
        if tables is not None and tables.shape[0] != num_seqs:
            raise InputError(f"block_tables has {tables.shape[0]} rows; {num_seqs} sequences need one each")
        self.version += 1
        self.page_size, self.num_tokens = page_size, num_tokens
        if self.native is None:
            self.num_pages = 0
            return
        address, width = (0, 0) if tables is None else (tables.data_ptr(), tables.shape[1])
        try:
            self.native.build(*(a.data_ptr() for a in arrays), num_seqs, address, width, page_size)
        except ValueError as error:
            raise InputError(str(error)) from None
        self.num_pages = self.native.num_pages

    def build_segments(self, begins: Tensor | np.ndarray, ends: Tensor | np.ndarray) -> None:
        """Makes queries of the rows [begins[i], ends[i]) of `kv_plan` (int32 [Q]), which must be built.

        Segments are in the order of the rows and lie within a sequence each. A query sees the keys that it sees in
        `kv_plan`, and is turned by the position it has there. `kv_plan` must stay as it is while this plan is used.
        Raises InputError for other segments, and for a plan that was not made from a `kv_plan`.
        """
        kv = self._kv_plan
        if kv is None:
            raise InputError("this plan has no other plan's rows to choose from; make it as AttentionPlan(kv_plan)")
        begins, ends = _int32(begins, "begins", 1), _int32(ends, "ends", 1)
        if begins.shape != ends.shape:
            raise InputError(f"there are {begins.shape[0]} begins and {ends.shape[0]} ends; a segment has one of each")
        self.begins, self.ends = begins, ends
        self.version += 1
        self.page_size, self.num_pages, self.num_tokens = kv.page_size, kv.num_pages, int((ends - begins).sum())
        if self.native is not None:
            try:
                self.native.build_segments(kv.native, begins.data_ptr(), ends.data_ptr(), begins.shape[0])
            except ValueError as error:
                raise InputError(str(error)) from None

    def rows(self) -> Tensor:
        """Which row of `kv_plan` each query is, int64 [T]."""
        if self._kv_plan is None:
            return torch.arange(self.num_tokens)
        begins, ends = self.begins.tolist(), self.ends.tolist()
        return torch.cat([torch.arange(0), *(torch.arange(b, e) for b, e in zip(begins, ends, strict=True))])


def _int32(values: Tensor | np.ndarray, name: str, dims: int) -> Tensor:
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if tensor.dtype != torch.int32 or tensor.dim() != dims:
        raise InputError(f"{name} is {tensor.dtype} of {tensor.dim()} dimensions; the plan takes torch.int32 of {dims}")
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def attention(
    qkv: Tensor,
    spec: AttentionSpec,
    rope: Tensor,
    plan: AttentionPlan,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    q_norm: Weight | None = None,
    k_norm: Weight | None = None,
    kv: Tensor | None = None,
) -> Tensor:
    """Causal attention of packed rows, [T, (H + 2K) Dh] -> [T, H Dh] in qkv's dtype.

    A row of `qkv` is its H query heads, then K key heads, then K value heads. Queries and keys are normed per head
    (where `q_norm`, `k_norm` [Dh] are given) and turned by `rope` (fp32 [P, Dh], see rope_table) in fp32 and rounded
    once. Keys and values go to the pages that `plan` names in `keys` and `values` (from allocate_pages), or, where
    these are None, to pages that live as long as the call. Then each query takes the softmax over the keys it sees,
    summed in fp32. float64 is computed in float64 throughout, with a float64 `rope`.

    A row's output has the same bits whatever else is in the batch, however its prompt was chunked, wherever its pages
    lie and however large they are. Under grad (without pages) the backward returns dqkv and adds to the norms'
    `grad_buffer()`; it runs on the plan, which must still be as built. Raises InputError for shapes or dtypes that do
    not match, and for gradients through a cache.

    With `kv` [T_kv, 2K Dh], `qkv` holds query heads only, [T, H Dh], of the rows that `plan` chooses of
    `plan.kv_plan`, and `kv` the key and value heads of all its rows (rows of either may be apart). Outputs have the
    bits that these rows have in attention of all rows. The gradients of `kv` and of `k_norm` are then the sums over
    these queries: those over all queries are the sums of them, since going back through RoPE and norm is linear.
    """
    _check(qkv, spec, rope, plan, keys, values, q_norm, k_norm, kv)
    if torch.is_grad_enabled() and (qkv.requires_grad or (kv is not None and kv.requires_grad)):
        if keys is not None:
            raise InputError("attention has no gradient through a KV cache; call it without keys and values")
        return _Attention.apply(qkv, kv, spec, rope, plan, q_norm, k_norm)
    kv = None if kv is None else kv.detach()
    return OP["forward", qkv](qkv.detach(), kv, spec, rope, plan, keys, values, q_norm, k_norm, False)[0]


class _Attention(torch.autograd.Function):
    """Saves qkv, kv, the output and the softmax's logarithm [T, H]; probabilities are computed again."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, kv: Tensor | None, spec: AttentionSpec, rope: Tensor, plan: AttentionPlan,
                q_norm: Weight | None, k_norm: Weight | None) -> Tensor:  # fmt: skip
        out, lse = OP["forward", qkv](qkv, kv, spec, rope, plan, None, None, q_norm, k_norm, True)
        ctx.save_for_backward(qkv, kv, out, lse)
        ctx.spec, ctx.rope, ctx.plan, ctx.q_norm, ctx.k_norm = spec, rope, plan, q_norm, k_norm
        ctx.version = plan.version, plan.kv_plan.version
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if (ctx.plan.version, ctx.plan.kv_plan.version) != ctx.version:
            raise InputError("the attention plan was built anew between forward and backward; use one plan per batch")
        qkv, kv, out, lse = ctx.saved_tensors
        d_qkv, d_kv = OP["backward", qkv](d_out.to(qkv.dtype).contiguous(), out, lse, qkv, kv, ctx.spec, ctx.rope,
                                                ctx.plan, ctx.q_norm, ctx.k_norm)  # fmt: skip
        return d_qkv, d_kv, None, None, None, None, None


def _check(qkv: Tensor, spec: AttentionSpec, rope: Tensor, plan: AttentionPlan, keys: Tensor | None,
           values: Tensor | None, q_norm: Weight | None, k_norm: Weight | None,
           kv: Tensor | None) -> None:  # fmt: skip
    if qkv.dtype not in MODEL_DTYPES.values():
        raise InputError(f"qkv is {qkv.dtype}; attention takes {', '.join(map(str, MODEL_DTYPES.values()))}")
    if kv is None:
        if plan.kv_plan is not plan:
            raise InputError("the plan is of queries alone; attention with it needs kv, the rows of plan.kv_plan")
        if qkv.dim() != 2 or qkv.shape[1] != spec.row_size or not qkv.is_contiguous():
            raise InputError(f"qkv is {tuple(qkv.shape)}; {spec} needs contiguous [T, {spec.row_size}]")
    else:
        _check_apart(qkv, kv, spec, plan)
    if (
        rope.dtype != wide_dtype(qkv.dtype)
        or rope.dim() != 2
        or rope.shape[1] != spec.head_dim
        or not rope.is_contiguous()
    ):
        raise InputError(
            f"rope is {rope.dtype} {tuple(rope.shape)}; {qkv.dtype} needs {wide_dtype(qkv.dtype)} [P, {spec.head_dim}]"
        )
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None and (norm.shape != (spec.head_dim,) or norm.dtype != qkv.dtype):
            raise InputError(f"{name} is {norm.dtype} {norm.shape}; qkv needs {qkv.dtype} ({spec.head_dim},)")
    if (keys is None) != (values is None):
        raise InputError("keys and values go together: give both or neither")
    if keys is None:
        if plan.kv_plan.block_tables is not None:
            raise InputError("the plan has block tables; attention with them needs keys and values")
        return
    assert values is not None
    if plan.kv_plan.block_tables is None:
        raise InputError("the plan has no block tables; attention with keys and values needs them")
    size = spec.num_kv_heads * plan.page_size
    for name, pages, columns in (
        ("keys", keys, size * _depth(spec, qkv.dtype)),
        ("values", values, size * spec.head_dim),
    ):
        if pages.dtype != qkv.dtype or pages.dim() != 2 or pages.shape[1] != columns or not pages.is_contiguous():
            raise InputError(
                f"{name} is {pages.dtype} {tuple(pages.shape)}; pages of {plan.page_size} tokens for {spec} are "
                f"{qkv.dtype} [num_pages, {columns}]"
            )
    if keys.shape[0] != values.shape[0]:
        raise InputError(f"there are {keys.shape[0]} pages of keys and {values.shape[0]} of values; give as many")


def _check_apart(q: Tensor, kv: Tensor, spec: AttentionSpec, plan: AttentionPlan) -> None:
    queries = spec.num_heads * spec.head_dim
    for name, x, columns in (("qkv", q, queries), ("kv", kv, spec.row_size - queries)):
        if x.dim() != 2 or x.shape[1] != columns or x.stride(1) != 1 or x.dtype != q.dtype:
            raise InputError(
                f"{name} is {x.dtype} {tuple(x.shape)}; keys and values apart from queries take {q.dtype} rows of "
                f"{columns} for {spec}"
            )
    if plan.kv_plan is plan:
        raise InputError("kv is given, so the plan must be one of queries alone; make it as AttentionPlan(kv_plan)")
    if kv.shape[0] < plan.kv_plan.num_tokens:
        raise InputError(f"kv has {kv.shape[0]} rows and its plan {plan.kv_plan.num_tokens}")


def _depth(spec: AttentionSpec, dtype: torch.dtype) -> int:
    """Rows of a key panel: the head width, in bf16 padded to whole matrix instructions."""
    return -(-spec.head_dim // 32) * 32 if dtype == torch.bfloat16 else spec.head_dim


def _page_shapes(spec: AttentionSpec, page_size: int, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, ...]]:
    pair = 2 if dtype == torch.bfloat16 else 1
    keys = (-1, spec.num_kv_heads, page_size // _BLOCK, _depth(spec, dtype) // pair, _BLOCK, pair)
    values = (-1, spec.num_kv_heads, spec.head_dim // 16, page_size // pair, 16, pair)
    return keys, values


# ---- the definition, in torch ----


def _definition(qkv: Tensor, kv: Tensor | None, spec: AttentionSpec, rope: Tensor, plan: AttentionPlan,
                keys: Tensor | None, values: Tensor | None, q_norm: Tensor | None,
                k_norm: Tensor | None) -> Tensor:  # fmt: skip
    dtype = qkv.dtype
    kv_plan, queries = plan.kv_plan, spec.num_heads * spec.head_dim
    q, kv = (qkv, kv) if kv is not None else qkv.split([queries, qkv.shape[1] - queries], 1)
    q, kv = (wide(x).unflatten(1, (-1, spec.head_dim)) for x in (q, kv))
    k, v = kv[: kv_plan.num_tokens].chunk(2, 1)
    at = plan.rows()  # the row of `k` and `v` that each query is
    q = wide(_norm_and_turn(q, q_norm, spec.eps, rope, kv_plan.positions[at]).to(dtype))
    k = wide(_norm_and_turn(k, k_norm, spec.eps, rope, kv_plan.positions).to(dtype))
    outs = [q.new_empty(0, spec.num_heads, spec.head_dim)]
    for s, context in enumerate(kv_plan.context_lens.tolist()):
        begin, end = kv_plan.cu_seqlens[s : s + 2].tolist()
        if keys is None or values is None:
            sequence_k, sequence_v = k[begin:end], v[begin:end]
        else:
            pages = kv_plan.block_tables[s]  # type: ignore[index]
            _write(keys, values, k[begin:end], v[begin:end], pages, context, spec, kv_plan.page_size)
            sequence_k, sequence_v = _read(keys, values, pages, context, spec, kv_plan.page_size)
        own = (at >= begin) & (at < end)
        query = (at[own] - end + context)[:, None]
        key = torch.arange(sequence_k.shape[0])[None]
        visible = (key <= query) & (key > query - (spec.window or context + 1))
        repeats = spec.num_heads // spec.num_kv_heads
        sequence_k, sequence_v = (x.repeat_interleave(repeats, 1) for x in (sequence_k, sequence_v))
        scores = torch.einsum("qhd,khd->hqk", q[own], sequence_k) * spec.scale
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, sequence_v))
    return torch.cat(outs).flatten(1).to(dtype)


def _norm_and_turn(x: Tensor, weight: Tensor | None, eps: float, rope: Tensor, positions: Tensor) -> Tensor:
    if weight is not None:
        x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(x.dtype)
    return apply_rope(x, rope, positions)


def _slots(pages: Tensor, begin: int, end: int, page_size: int) -> tuple[Tensor, Tensor]:
    at = torch.arange(begin, end)
    return pages.long()[at // page_size], at % page_size


def _write(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, pages: Tensor, context: int, spec: AttentionSpec,
           page_size: int) -> None:  # fmt: skip
    key_shape, value_shape = _page_shapes(spec, page_size, keys.dtype)
    pair = key_shape[-1]
    page, slot = _slots(pages, context - k.shape[0], context, page_size)
    k = torch.nn.functional.pad(k.detach().to(keys.dtype), (0, _depth(spec, keys.dtype) - spec.head_dim))
    v = v.detach().to(values.dtype)
    keys.view(key_shape)[page, :, slot // _BLOCK, :, slot % _BLOCK] = k.view(*k.shape[:2], key_shape[3], pair)
    values.view(value_shape)[page, :, :, slot // pair, :, slot % pair] = v.view(*v.shape[:2], value_shape[2], 16)


def _read(keys: Tensor, values: Tensor, pages: Tensor, context: int, spec: AttentionSpec,
          page_size: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    key_shape, value_shape = _page_shapes(spec, page_size, keys.dtype)
    pair = key_shape[-1]
    page, slot = _slots(pages, 0, context, page_size)
    k = keys.view(key_shape)[page, :, slot // _BLOCK, :, slot % _BLOCK].flatten(2)[..., : spec.head_dim]
    v = values.view(value_shape)[page, :, :, slot // pair, :, slot % pair].flatten(2)
    return wide(k), wide(v)


def _torch_forward(qkv: Tensor, kv: Tensor | None, spec: AttentionSpec, rope: Tensor, plan: AttentionPlan,
                   keys: Tensor | None, values: Tensor | None, q_norm: Weight | None, k_norm: Weight | None,
                   want_lse: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    with torch.no_grad():
        norms = (None if w is None else w.data for w in (q_norm, k_norm))
        return _definition(qkv, kv, spec, rope, plan, keys, values, *norms), None


def _torch_backward(d_out: Tensor, out: Tensor, lse: Tensor | None, qkv: Tensor, kv: Tensor | None,
                    spec: AttentionSpec, rope: Tensor, plan: AttentionPlan, q_norm: Weight | None,
                    k_norm: Weight | None) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    norms = [None if w is None else w.data.detach().requires_grad_() for w in (q_norm, k_norm)]
    given = [w for w in norms if w is not None]
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (qkv, kv) if x is not None]
        out = _definition(leaves[0], leaves[1] if kv is not None else None, spec, rope, plan, None, None, *norms)
        d_leaves = torch.autograd.grad(out, [*leaves, *given], d_out)
    d_rows, d_norms = d_leaves[: len(leaves)], d_leaves[len(leaves) :]
    for weight, gradient in zip([w for w in (q_norm, k_norm) if w is not None], d_norms, strict=True):
        weight.grad_buffer().add_(gradient)
    return d_rows[0], d_rows[1] if kv is not None else None


# ---- C++: csrc/cpu/attention.inl ----


def _rows(x: Tensor) -> tuple[int, int, int]:
    """Address, elements from a row to the next, rows."""
    return x.data_ptr(), x.stride(0), x.shape[0]


def _apart(qkv: Tensor, kv: Tensor | None, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Queries, and keys with values: columns of qkv where they are not given apart."""
    return (qkv, qkv[:, spec.num_heads * spec.head_dim :]) if kv is None else (qkv, kv)


def _shared_arguments(qkv: Tensor, kv: Tensor | None, spec: AttentionSpec, rope: Tensor, plan: AttentionPlan,
                      q_norm: Weight | None, k_norm: Weight | None, out: Tensor,
                      lse: Tensor | None) -> tuple[Any, ...]:  # fmt: skip
    shape = (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.window or 0)
    norms = (0 if norm is None else norm.data.data_ptr() for norm in (q_norm, k_norm))
    return (plan.native, plan.kv_plan.native, DTYPES[qkv.dtype], shape, spec.scale, spec.eps,
            *map(_rows, _apart(qkv, kv, spec)), rope.data_ptr(), rope.shape[0], *norms, out.data_ptr(),
            0 if lse is None else lse.data_ptr())  # fmt: skip


def _gradient(norm: Weight | None) -> int:
    return 0 if norm is None else norm.grad_buffer().data_ptr()


def _cpu_forward(qkv: Tensor, kv: Tensor | None, spec: AttentionSpec, rope: Tensor, plan: AttentionPlan,
                 keys: Tensor | None, values: Tensor | None, q_norm: Weight | None, k_norm: Weight | None,
                 want_lse: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    if keys is None or values is None:
        size = spec.num_kv_heads * plan.page_size
        keys = empty((plan.num_pages, size * _depth(spec, qkv.dtype)), qkv.dtype)
        values = empty((plan.num_pages, size * spec.head_dim), qkv.dtype)
    out = empty((qkv.shape[0], spec.num_heads * spec.head_dim), qkv.dtype)
    lse = empty((qkv.shape[0], spec.num_heads), torch.float32) if want_lse else None
    extension().attention_forward(
        *_shared_arguments(qkv, kv, spec, rope, plan, q_norm, k_norm, out, lse),
        keys.data_ptr(), values.data_ptr(), keys.shape[0],
    )  # fmt: skip
    return out, lse


def _cpu_backward(d_out: Tensor, out: Tensor, lse: Tensor, qkv: Tensor, kv: Tensor | None, spec: AttentionSpec,
                  rope: Tensor, plan: AttentionPlan, q_norm: Weight | None,
                  k_norm: Weight | None) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    d_qkv = empty(tuple(qkv.shape), qkv.dtype)
    d_kv = None if kv is None else empty(tuple(kv.shape), kv.dtype)
    extension().attention_backward(
        *_shared_arguments(qkv, kv, spec, rope, plan, q_norm, k_norm, out, lse), d_out.data_ptr(),
        *map(_rows, _apart(d_qkv, d_kv, spec)), _gradient(q_norm), _gradient(k_norm),
    )  # fmt: skip
    return d_qkv, d_kv


OP = Op(
    "attention",
    [
        cpu_backend({"forward": _cpu_forward, "backward": _cpu_backward}, DTYPES),
        Backend("torch", {"forward": _torch_forward, "backward": _torch_backward}, exact=False),
    ],
)
