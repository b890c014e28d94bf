"""Attention's definition in plain torch: what its kernels are held against, and what runs where there are none.

# T tokens, S sequences, H query heads, K key/value heads, Dh head width
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.attention_call import AttentionCall
from engine.kernels.attention_pages import read_pages, to_page, write_pages
from engine.kernels.dtypes import wide
from engine.kernels.rope import apply_rope


def forward(call: AttentionCall, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    """The output [T, H Dh]; None stands for the logarithm of the softmax, which only kernels save."""
    with torch.no_grad():
        norms = (None if w is None else w.data for w in (call.q_norm, call.k_norm))
        return _definition(call, *norms), None


def backward(call: AttentionCall, d_out: Tensor, out: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients of qkv and kv; those of the norms are added to their weights'."""
    kv, weights = call.kv, (call.q_norm, call.k_norm)
    norms = [None if w is None else w.data.detach().requires_grad_() for w in weights]
    given = [w for w in norms if w is not None]
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (call.qkv, kv) if x is not None]
        out = _definition(call._replace(qkv=leaves[0], kv=leaves[1] if kv is not None else None), *norms)
        d_leaves = torch.autograd.grad(out, [*leaves, *given], d_out)
    d_rows, d_norms = d_leaves[: len(leaves)], d_leaves[len(leaves) :]
    for weight, gradient in zip([w for w in weights if w is not None], d_norms, strict=True):
        weight.grad_buffer().add_(gradient)
    return d_rows[0], d_rows[1] if kv is not None else None


def _definition(call: AttentionCall, q_norm: Tensor | None, k_norm: Tensor | None) -> Tensor:
    qkv, spec, rope, plan, keys, values, _, _, kv = call
    dtype = qkv.dtype
    kv_plan, queries = plan.kv_plan, spec.num_heads * spec.head_dim
    q, kv = (qkv, kv) if kv is not None else qkv.split([queries, qkv.shape[1] - queries], 1)
    q, kv = (wide(x).unflatten(1, (-1, spec.head_dim)) for x in (q, kv))
    k, v = kv[: kv_plan.num_tokens].chunk(2, 1)
    at = plan.rows()  # the row of `k` and `v` that each query is
    q = wide(_norm_and_turn(q, q_norm, spec.eps, rope, kv_plan.positions[at]).to(dtype))
    k = wide(_norm_and_turn(k, k_norm, spec.eps, rope, kv_plan.positions).to(dtype))
    k, v = (x + (to_page(x, spec.kv_dtype) - x).detach() for x in (k, v)) if spec.kv_dtype else (k, v)
    outs = [q.new_empty(0, spec.num_heads, spec.head_dim)]
    for s, context in enumerate(kv_plan.context_lens.tolist()):
        begin, end = kv_plan.cu_seqlens[s : s + 2].tolist()
        if keys is None or values is None:
            sequence_k, sequence_v = k[begin:end], v[begin:end]
        else:
            pages = kv_plan.block_tables[s]  # type: ignore[index]
            write_pages(keys, values, k[begin:end], v[begin:end], pages, context, spec, kv_plan.page_size)
            sequence_k, sequence_v = read_pages(keys, values, pages, context, spec, kv_plan.page_size)
        own = (at >= begin) & (at < end)
        query = (at[own] - end + context)[:, None]
        key = torch.arange(sequence_k.shape[0], device=at.device)[None]
        visible = (key <= query) & (key > query - (spec.window or context + 1))
        repeats = spec.num_heads // spec.num_kv_heads
        sequence_k, sequence_v = (x.repeat_interleave(repeats, 1) for x in (sequence_k, sequence_v))
        scores = torch.einsum("qhd,khd->hqk", q[own], sequence_k) * spec.scale
        weights = scores.masked_fill(~visible.to(scores.device), float("-inf")).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, sequence_v))
    return torch.cat(outs).flatten(1).to(dtype)


def _norm_and_turn(x: Tensor, weight: Tensor | None, eps: float, rope: Tensor, positions: Tensor) -> Tensor:
    if weight is not None:
        x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(x.dtype)
    return apply_rope(x, rope, positions)
