"""Attention at the shapes that a model gives it, forward, backward and decode, beside all of torch's backends and
flash-attn: the rows of `kernels` and `exactness_cost`.

Ours starts from the fused q, k, v and includes RoPE and the writing of keys and values; its backward ends with the
gradient of these. The others are handed queries and keys that are turned already, in their own layout.

# T tokens, S sequences, H query heads, K key/value heads, Dh head width
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.case import Case
from benchmarks.flash_attention import FlashAttention
from benchmarks.workloads import size
from engine.config import ModelConfig
from engine.kernels.attention import OP, OP_E4M3, AttentionPlan, AttentionSpec, allocate_pages, attention
from engine.kernels.attention_call import AttentionCall
from engine.kernels.op import Op, use_backend
from engine.kernels.rope import rope_table

SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}  # fmt: skip
# Products in a backward (S again, dP, dV, dQ, dK) over those of a forward (S, O): what flash-attn's figures count.
BACKWARD_FLOPS = 2.5
Run = Callable[[], object]


def exact_backends() -> list[str]:
    """Names of all of attention's backends that keep the contract, whether or not they can run here."""
    return [each.name for each in OP.backends if each.exact]


def serving(op: Op, dtype: torch.dtype, device: str, asked: Sequence[str] = ()) -> list[str]:
    """Those of the backends `asked` for that can run there, or the one that serves if there is none."""
    able = [each.name for each in op.backends if each.name in asked and not each.refusal(dtype, device)]
    return able or [op.chosen(dtype, device).name]


def on_backend(name: str, function: Run) -> Run:
    def run() -> object:
        with use_backend(name):
            return function()

    return run


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)


def repeated(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Keys and values once for each query head, for backends that know no groups: more to read, but not timed."""
    return [q, *(x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))]


def sdpa_backends(make: Callable[..., Run], heads: list[Tensor]) -> dict[str, Run]:
    """What `make` (of q, k, v) makes under each of torch's backends that can run it on a GPU; on a CPU there is one."""
    return {} if heads[0].device.type == "cpu" else under_each(make, heads)


def under_each(make: Callable[..., Run], heads: list[Tensor]) -> dict[str, Run]:
    """On a CPU too, where there is a flash and a math one."""
    given = {"": heads} if heads[0].shape[1] == heads[1].shape[1] else {"": heads, ", heads repeated": repeated(*heads)}
    found: dict[str, Run] = {}
    for name, backend in SDPA.items():
        for suffix, tensors in given.items():
            with (
                warnings.catch_warnings(),
                suppress(RuntimeError),
            ):  # no kernel, or no memory: torch says it no other way
                warnings.simplefilter("ignore")  # why there is none
                found[name + suffix] = _under(backend, make, tensors)
                break
    return found


def _under(backend: SDPBackend, make: Callable[..., Run], heads: list[Tensor]) -> Run:
    """Made and run once. Raises RuntimeError where the backend cannot."""
    with sdpa_kernel(backend):
        function = make(*heads)

    def run() -> object:
        with sdpa_kernel(backend):
            return function()

    run()
    return run


def attention_cases(
    config: ModelConfig,
    dtype: torch.dtype,
    lengths: list[int],
    decode: tuple[int, int, int],
    backends: Sequence[str] = (),
    peers: Sequence[FlashAttention] = (),
) -> Iterator[Case]:
    """Causal attention over whole sequences, its backward, both together, and one token each of `decode` = (S, keys,
    page size) sequences, from pages of the model's dtype and of e4m3 (beside the others' in the model's dtype).

    A case each for those of our `backends` that can run on the default device, or, without any, for the one that
    serves. A forward and backward counts 3 forwards, as a model's training does.
    """
    spec = AttentionSpec(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    rope = rope_table(config.head_dim, config.rope_theta, config.rope_scaling, max(*lengths, decode[1]) + 1)
    ours = serving(OP, dtype, torch.get_default_device().type, backends)
    for length in lengths:
        yield from _whole_cases(config, spec, rope, dtype, max(1, max(lengths) // length), length, ours, peers)
    for kv_dtype in (None, torch.float8_e4m3fn):
        paged, op = replace(spec, kv_dtype=kv_dtype), OP if kv_dtype is None else OP_E4M3
        able = serving(op, dtype, torch.get_default_device().type, backends)
        yield from _decode_cases(paged, rope, dtype, *decode, able, peers)


def _named(op: str, backend: str, ours: Sequence[str]) -> str:
    return op if len(ours) == 1 else f"{op} ({backend})"


def _heads(spec: AttentionSpec, sequences: int, query_length: int, length: int, dtype: torch.dtype) -> list[Tensor]:
    """Random q, k, v as SDPA has them, [S, heads, T, Dh]."""
    counts = ((spec.num_heads, query_length), (spec.num_kv_heads, length), (spec.num_kv_heads, length))
    return [torch.randn(sequences, count, rows, spec.head_dim).to(dtype) for count, rows in counts]


def _rows_first(heads: list[Tensor]) -> list[Tensor]:
    """[S, T, heads, Dh], as flash-attn has them."""
    return [x.transpose(1, 2).contiguous() for x in heads]


def _whole_cases(
    config: ModelConfig, spec: AttentionSpec, rope: Tensor, dtype: torch.dtype, sequences: int, length: int,
    ours: Sequence[str], peers: Sequence[FlashAttention],
) -> Iterator[Case]:  # fmt: skip
    rows = sequences * length
    plan = AttentionPlan()
    with torch.device("cpu"):
        ends = torch.arange(0, rows + 1, length, dtype=torch.int32)
        plan.build(ends, ends.diff(), torch.arange(length, dtype=torch.int32).repeat(sequences))
    qkv = torch.randn(rows, spec.row_size).to(dtype)
    d_rows = torch.randn(rows, spec.num_heads * spec.head_dim).to(dtype)
    leaf = qkv.clone().requires_grad_()
    heads = _heads(spec, sequences, length, length, dtype)
    d_out = d_rows.view(sequences, length, spec.num_heads, spec.head_dim)
    flops = 2 * size(config).attention / config.num_hidden_layers * sequences * length * (length + 1) / 2
    shape = f"S={sequences} T={rows} Dh={config.head_dim}"

    def forward_of(q: Tensor, k: Tensor, v: Tensor) -> Run:
        return partial(sdpa, q, k, v, causal=True)

    def both(function: Callable[..., Tensor], leaves: list[Tensor], gradient: Tensor) -> Run:
        return lambda: torch.autograd.grad(function(*leaves), leaves, gradient)

    def backward(function: Callable[..., Tensor], leaves: list[Tensor], gradient: Tensor) -> Run:
        out = function(*leaves)
        return lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True)

    def of_sdpa(gradients: Callable[..., Run], q: Tensor, k: Tensor, v: Tensor) -> Run:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        return gradients(partial(sdpa, causal=True), leaves, d_out.transpose(1, 2).contiguous())

    flat = _rows_first(heads)
    cases: list[tuple[str, float, Callable[[str], Run], Callable[..., Run], dict[str, Run]]] = [
        ("attention prefill", flops,
         lambda name: on_backend(name, partial(attention, qkv, spec, rope, plan)),
         forward_of,
         {peer.name: partial(peer.forward, *flat) for peer in peers}),
        ("attention backward", BACKWARD_FLOPS * flops,
         lambda name: backward_alone(name, d_rows, qkv, spec, rope, plan),
         partial(of_sdpa, backward),
         {peer.name: _late(partial(backward, peer.forward, _leaves(flat), d_out)) for peer in peers}),
        ("attention forward + backward", 3 * flops,
         lambda name: on_backend(name, both(lambda x: attention(x, spec, rope, plan), [leaf], d_rows)),
         partial(of_sdpa, both),
         {peer.name: both(peer.forward, _leaves(flat), d_out) for peer in peers}),
    ]  # fmt: skip
    for op, work, own, torchs, theirs in cases:
        beside, named = torchs(*heads), sdpa_backends(torchs, heads)
        for name in ours:
            yield Case(_named(op, name, ours), shape, "flops", work, own(name), beside, named, theirs)


def _leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [x.clone().requires_grad_() for x in tensors]


def _late(make: Callable[[], Run]) -> Run:
    """What `make` makes when it is first run."""
    made: list[Run] = []

    def run() -> object:
        if not made:
            made.append(make())
        return made[0]()

    return run


def backward_alone(
    name: str, d_out: Tensor, qkv: Tensor, spec: AttentionSpec, rope: Tensor, plan: AttentionPlan
) -> Run:  # fmt: skip
    """The backward of our backend `name` by itself, on what its forward saves when it is first run."""
    functions = next(each for each in OP.backends if each.name == name).functions

    call = AttentionCall(qkv, spec, rope, plan)

    def make() -> Run:
        out, lse = functions["forward"](call, True)
        return partial(functions["backward"], call, d_out, out, lse)

    return on_backend(name, _late(make))


def _decode_cases(
    spec: AttentionSpec, rope: Tensor, dtype: torch.dtype, sequences: int, keys: int, page_size: int,
    ours: Sequence[str], peers: Sequence[FlashAttention],
) -> Iterator[Case]:  # fmt: skip
    pages_each = -(-keys // page_size)
    plan = AttentionPlan()
    with torch.device("cpu"):
        plan.build(torch.arange(sequences + 1, dtype=torch.int32), torch.full((sequences,), keys, dtype=torch.int32),
                   positions=torch.full((sequences,), keys - 1, dtype=torch.int32),
                   block_tables=torch.arange(sequences * pages_each, dtype=torch.int32).view(sequences, -1),
                   page_size=page_size)  # fmt: skip
    qkv = torch.randn(sequences, spec.row_size).to(dtype)
    heads = _heads(spec, sequences, 1, keys, dtype)
    itemsize, suffix = (dtype.itemsize, "") if spec.kv_dtype is None else (1, "_e4m3")
    read = 2 * sequences * keys * spec.num_kv_heads * spec.head_dim * itemsize

    def one(q: Tensor, k: Tensor, v: Tensor) -> Run:
        return partial(sdpa, q, k, v, causal=False)

    named = sdpa_backends(one, heads)
    q, k, v = _rows_first(heads)
    lengths = torch.full((sequences,), keys, dtype=torch.int32)
    theirs: dict[str, Run] = {peer.name: partial(peer.decode, q, k, v, lengths) for peer in peers}
    for name in ours:
        with use_backend(name):
            pages = allocate_pages(sequences * pages_each, page_size, spec, dtype)
        for pool in pages:
            pool.copy_(torch.randn(pool.shape))
        yield Case(_named(f"attention{suffix} decode", name, ours), f"S={sequences} keys={keys} Dh={spec.head_dim}",
                   "bytes", read, on_backend(name, partial(attention, qkv, spec, rope, plan, *pages)), one(*heads),
                   named, theirs)  # fmt: skip
