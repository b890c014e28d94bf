"""Paged attention with grouped queries: q/k norm, RoPE, the write of keys and values, and the walk over them.

One kernel serves prefill, chunked prefill, decode, scoring and training; csrc/cpu/attention.inl draws the walk.

# T tokens, S sequences, B pages per sequence, H query heads, K key/value heads, Dh head width, P positions
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.errors import InputError
from engine.kernels import attention_definition
from engine.kernels.attention_call import AttentionCall
from engine.kernels.attention_pages import ATTENTION_DTYPES, AttentionSpec, allocate_pages, depth_of, page_columns
from engine.kernels.attention_plan import AttentionPlan
from engine.kernels.dtypes import TRITON_DTYPES, wide_dtype
from engine.kernels.graph import empty
from engine.kernels.op import Backend, Op, cpu_backend, cuda_backend, extension, hopper_backend, triton_backend
from engine.kernels.weight import DTYPES, Weight

__all__ = ["AttentionPlan", "AttentionSpec", "allocate_pages", "attention"]


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
    call = AttentionCall(qkv, spec, rope, plan, keys, values, q_norm, k_norm, kv)
    _check(call)
    if torch.is_grad_enabled() and (qkv.requires_grad or (kv is not None and kv.requires_grad)):
        if keys is not None:
            raise InputError("attention has no gradient through a KV cache; call it without keys and values")
        return _Attention.apply(qkv, kv, call)
    call = call._replace(qkv=qkv.detach(), kv=None if kv is None else kv.detach())
    return _op(spec)["forward", qkv](call, False)[0]


class _Attention(torch.autograd.Function):
    """Saves qkv, kv, the output and `lse`; probabilities are computed again, as 2^(scale log2(e) q.k - lse).

    lse[t, h] = log2 of the sum over the keys that row t sees of exp(scale q.k): fp32 [T, H], a logarithm to base 2.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, kv: Tensor | None, call: AttentionCall) -> Tensor:
        ctx.backend = _op(call.spec).serving(qkv)
        out, lse = ctx.backend.functions["forward"](call._replace(qkv=qkv, kv=kv), True)
        ctx.save_for_backward(qkv, kv, out, lse)
        ctx.others = call[1:-1]  # qkv and kv are kept by autograd, which knows when they may go
        ctx.version = call.plan.version, call.plan.kv_plan.version
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        qkv, kv, out, lse = ctx.saved_tensors
        call = AttentionCall._make([qkv, *ctx.others, kv])
        if (call.plan.version, call.plan.kv_plan.version) != ctx.version:
            raise InputError("the attention plan was built anew between forward and backward; use one plan per batch")
        d_qkv, d_kv = ctx.backend.functions["backward"](call, d_out.to(qkv.dtype).contiguous(), out, lse)
        return d_qkv, d_kv, None


def _check(call: AttentionCall) -> None:
    qkv, spec, rope, plan, keys, values, q_norm, k_norm, kv = call
    if qkv.dtype not in ATTENTION_DTYPES:
        raise InputError(f"qkv is {qkv.dtype}; attention takes {', '.join(map(str, ATTENTION_DTYPES))}")
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
    dtype = spec.kv_dtype or qkv.dtype
    widths = page_columns(spec, plan.page_size, dtype, keys.device.type)
    for name, pages, columns in zip(("keys", "values"), (keys, values), widths, strict=True):
        if pages.dtype != dtype or pages.dim() != 2 or pages.shape[1] != columns or not pages.is_contiguous():
            raise InputError(
                f"{name} is {pages.dtype} {tuple(pages.shape)}; pages of {plan.page_size} tokens for {spec} are "
                f"{dtype} [num_pages, {columns}]"
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


# ---- C++: csrc/cpu/attention.inl ----


def _rows(x: Tensor) -> tuple[int, int, int]:
    """Address, elements from a row to the next, rows."""
    return x.data_ptr(), x.stride(0), x.shape[0]


def _apart(qkv: Tensor, kv: Tensor | None, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Queries, and keys with values: columns of qkv where they are not given apart."""
    return (qkv, qkv[:, spec.num_heads * spec.head_dim :]) if kv is None else (qkv, kv)


def _shared_arguments(call: AttentionCall, out: Tensor, lse: Tensor | None) -> tuple[Any, ...]:
    qkv, spec, rope, plan, _, _, q_norm, k_norm, kv = call
    shape = (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.window or 0)
    norms = (0 if norm is None else norm.data.data_ptr() for norm in (q_norm, k_norm))
    return (plan.native, plan.kv_plan.native, DTYPES[qkv.dtype], shape, spec.scale, spec.eps,
            *map(_rows, _apart(qkv, kv, spec)), rope.data_ptr(), rope.shape[0], *norms, out.data_ptr(),
            0 if lse is None else lse.data_ptr())  # fmt: skip


def _gradient(norm: Weight | None) -> int:
    return 0 if norm is None else norm.grad_buffer().data_ptr()


def _cpu_forward(call: AttentionCall, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    qkv, spec, _, plan, keys, values, _, _, _ = call
    if keys is None or values is None:
        size = spec.num_kv_heads * plan.page_size
        keys = empty((plan.num_pages, size * depth_of(spec, qkv.dtype)), qkv.dtype)
        values = empty((plan.num_pages, size * spec.head_dim), qkv.dtype)
    out = empty((qkv.shape[0], spec.num_heads * spec.head_dim), qkv.dtype)
    lse = empty((qkv.shape[0], spec.num_heads), torch.float32) if want_lse else None
    extension().attention_forward(*_shared_arguments(call, out, lse), keys.data_ptr(), values.data_ptr(), keys.shape[0])
    return out, lse


def _cpu_backward(call: AttentionCall, d_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor | None]:
    d_qkv = empty(tuple(call.qkv.shape), call.qkv.dtype)
    d_kv = None if call.kv is None else empty(tuple(call.kv.shape), call.kv.dtype)
    extension().attention_backward(
        *_shared_arguments(call, out, lse), d_out.data_ptr(), *map(_rows, _apart(d_qkv, d_kv, call.spec)),
        _gradient(call.q_norm), _gradient(call.k_norm),
    )  # fmt: skip
    return d_qkv, d_kv


_TORCH = Backend(
    "torch", {"forward": attention_definition.forward, "backward": attention_definition.backward}, exact=False
)

_TRITON = triton_backend("attention", "forward", "backward", dtypes=TRITON_DTYPES)
# After Triton until a GPU has shown that its bits are Triton's: it serves where `use_backend("cuda")` asks for it.
_CUDA = cuda_backend("attention", "forward", "backward", dtypes=(torch.bfloat16, torch.float16))

# The same, and its bits are its own: it takes keys in other tiles than Triton's where heads have 128 columns.
_HOPPER = hopper_backend("attention", "forward", "backward", dtypes=(torch.bfloat16, torch.float16))

OP = Op(
    "attention",
    [cpu_backend({"forward": _cpu_forward, "backward": _cpu_backward}, DTYPES), _TRITON, _CUDA, _HOPPER, _TORCH],
)
OP_E4M3 = Op("attention_e4m3", [_TRITON, _CUDA, _TORCH])  # keys and values in float8_e4m3fn, which no copy widens


def _op(spec: AttentionSpec) -> Op:
    return OP if spec.kv_dtype is None else OP_E4M3
