"""Every op at the shapes that a model gives it, beside what torch offers for the same: the rows of `kernels` and
`exactness_cost`.

# T tokens, N columns, K width, S sequences, V vocabulary, D model width, Dh head width
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.workloads import size
from engine.config import ModelConfig
from engine.kernels.adamw import adamw_, squared_norm
from engine.kernels.attention import AttentionPlan, AttentionSpec, allocate_pages, attention
from engine.kernels.embedding import embedding
from engine.kernels.linear import linear, linear_grad_input, linear_grad_weight_
from engine.kernels.rms_norm import add_rms_norm, rms_norm
from engine.kernels.rope import rope_table
from engine.kernels.sample_token import sample_token
from engine.kernels.shard_logprob import fold_statistics, shard_statistics, shard_targets
from engine.kernels.swiglu import swiglu
from engine.kernels.token_logprob import token_logprob
from engine.kernels.weight import Weight

SHARDS = 8  # of the vocabulary, where one of them is measured


@dataclass(frozen=True)
class Case:
    """One op at one shape. `work` is operations where `kind` is "flops" and bytes moved where it is "bytes"."""

    op: str
    shape: str
    kind: str
    work: float
    ours: Callable[[], object]
    torch: Callable[[], object] | None
    backends: dict[str, Callable[[], object]] = field(default_factory=dict)  # torch's, where it has several


def sdpa_backends(function: Callable[[], object]) -> dict[str, Callable[[], object]]:
    """`function` under each backend of torch's SDPA that can run it on a GPU; on a CPU there is one."""
    if torch.get_default_device().type == "cpu":
        return {}
    named = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
             "efficient": SDPBackend.EFFICIENT_ATTENTION}  # fmt: skip

    def under(backend: SDPBackend) -> object:
        with sdpa_kernel(backend):
            return function()

    found: dict[str, Callable[[], object]] = {}
    for name, backend in named.items():
        try:
            under(backend)
        except RuntimeError:  # "no available kernel": torch says so in no other way
            continue
        found[name] = partial(under, backend)
    return found


def _weight(name: str, shape: tuple[int, ...], dtype: torch.dtype, packed: bool) -> tuple[Weight, Tensor]:
    dense = (torch.randn(shape) * 0.02).to(dtype)
    weight = Weight(name, shape, dtype, packed=packed)
    weight.load_(dense)
    return weight, dense


def matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """[N, K] of each matrix of a layer, and of the head."""
    query, key_value = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {
        "qkv": (query + 2 * key_value, config.hidden_size),
        "out": (config.hidden_size, query),
        "gate_up": (2 * config.intermediate_size, config.hidden_size),
        "down": (config.hidden_size, config.intermediate_size),
        "head": (config.vocab_size, config.hidden_size),
    }


def linear_cases(config: ModelConfig, dtype: torch.dtype, tokens: list[int]) -> Iterator[Case]:
    """The forward of every matrix; a single row is bound by reading the weight, which stays in the cache here."""
    for name, (columns, width) in matrices(config).items():
        weight, dense = _weight(name, (columns, width), dtype, packed=True)
        for rows in tokens:
            x = torch.randn(rows, width).to(dtype)
            kind = "bytes" if rows == 1 else "flops"
            work = weight.nbytes if rows == 1 else 2 * rows * columns * width
            yield Case("linear", f"{name} T={rows} N={columns} K={width}", kind, work,
                       partial(linear, x, weight),
                       partial(functional.linear, x, dense))  # fmt: skip


def linear_gradient_cases(config: ModelConfig, dtype: torch.dtype, rows: int) -> Iterator[Case]:
    """Both gradients of one matrix of the feed-forward."""
    columns, width = matrices(config)["gate_up"]
    weight, dense = _weight("gate_up", (columns, width), dtype, packed=True)
    x, dy = torch.randn(rows, width).to(dtype), torch.randn(rows, columns).to(dtype)
    work, shape = 2 * rows * columns * width, f"gate_up T={rows} N={columns} K={width}"
    yield Case("linear_grad_input", shape, "flops", work, lambda: linear_grad_input(dy, weight), lambda: dy @ dense)
    yield Case("linear_grad_weight", shape, "flops", work, lambda: linear_grad_weight_(dy, x, weight), lambda: dy.T @ x)


def attention_cases(
    config: ModelConfig, dtype: torch.dtype, lengths: list[int], decode: tuple[int, int, int]
) -> Iterator[Case]:
    """Causal attention over whole sequences, its gradient, and one token each of `decode` = (S, keys, page size)
    sequences, from pages of the model's dtype and of e4m3 (beside torch's attention in the model's dtype).

    Ours starts from the fused q, k, v and includes RoPE and the writing of keys and values; SDPA is handed queries and
    keys that are turned already, in its own layout.
    """
    spec = AttentionSpec(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    rope = rope_table(config.head_dim, config.rope_theta, config.rope_scaling, max(*lengths, decode[1]) + 1)

    def heads(count: int, sequences: int, length: int) -> Tensor:
        return torch.randn(sequences, count, length, config.head_dim).to(dtype)

    def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    def gradient(function: Callable[..., Tensor], inputs: list[Tensor], d_out: Tensor) -> object:
        return torch.autograd.grad(function(*inputs), inputs, d_out)

    flops_per_key = 2 * size(config).attention / config.num_hidden_layers
    for length in lengths:
        sequences = max(1, max(lengths) // length)
        rows = sequences * length
        plan = AttentionPlan()
        ends = torch.arange(0, rows + 1, length, dtype=torch.int32, device="cpu")
        plan.build(ends, ends.diff(), torch.arange(length, dtype=torch.int32, device="cpu").repeat(sequences))
        qkv = torch.randn(rows, spec.row_size).to(dtype)
        q, k, v = (heads(n, sequences, length) for n in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads))
        flops = flops_per_key * sequences * length * (length + 1) / 2
        shape = f"S={sequences} T={rows} Dh={config.head_dim}"
        forward = partial(sdpa, q, k, v, causal=True)
        yield Case("attention prefill", shape, "flops", flops, partial(attention, qkv, spec, rope, plan), forward,
                   sdpa_backends(forward))  # fmt: skip
        leaf, dy = qkv.clone().requires_grad_(), torch.randn(rows, spec.num_heads * spec.head_dim).to(dtype)
        leaves, dout = [t.clone().requires_grad_() for t in (q, k, v)], heads(spec.num_heads, sequences, length)
        yield Case("attention forward + backward", shape, "flops", 3 * flops,
                   partial(gradient, partial(attention, spec=spec, rope=rope, plan=plan), [leaf], dy),
                   both := partial(gradient, partial(sdpa, causal=True), leaves, dout),
                   sdpa_backends(both))  # fmt: skip
    for kv_dtype in (None, torch.float8_e4m3fn):
        yield from _decode_cases(replace(spec, kv_dtype=kv_dtype), rope, dtype, *decode, sdpa)


def _decode_cases(
    spec: AttentionSpec, rope: Tensor, dtype: torch.dtype, sequences: int, keys: int, page_size: int,
    sdpa: Callable[[Tensor, Tensor, Tensor, bool], Tensor],
) -> Iterator[Case]:  # fmt: skip
    pages_each = -(-keys // page_size)
    pages = allocate_pages(sequences * pages_each, page_size, spec, dtype)
    for pool in pages:
        pool.copy_(torch.randn(pool.shape))
    plan = AttentionPlan()
    with torch.device("cpu"):
        plan.build(torch.arange(sequences + 1, dtype=torch.int32), torch.full((sequences,), keys, dtype=torch.int32),
                   positions=torch.full((sequences,), keys - 1, dtype=torch.int32),
                   block_tables=torch.arange(sequences * pages_each, dtype=torch.int32).view(sequences, -1),
                   page_size=page_size)  # fmt: skip
    qkv = torch.randn(sequences, spec.row_size).to(dtype)
    q, k, v = (torch.randn(sequences, n, length, spec.head_dim).to(dtype) for n, length in
               ((spec.num_heads, 1), (spec.num_kv_heads, keys), (spec.num_kv_heads, keys)))  # fmt: skip
    itemsize, suffix = (dtype.itemsize, "") if spec.kv_dtype is None else (1, "_e4m3")
    read = 2 * sequences * keys * spec.num_kv_heads * spec.head_dim * itemsize
    one = partial(sdpa, q, k, v, False)
    yield Case(f"attention{suffix} decode", f"S={sequences} keys={keys} Dh={spec.head_dim}", "bytes", read,
               lambda: attention(qkv, spec, rope, plan, *pages), one, sdpa_backends(one))  # fmt: skip


def row_cases(config: ModelConfig, dtype: torch.dtype, rows: int) -> Iterator[Case]:
    """Norms, SwiGLU and the embedding: bound by memory."""
    width, inner = config.hidden_size, config.intermediate_size
    norm, dense_norm = _weight("norm", (width,), dtype, packed=False)
    x, delta = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype)
    moved = rows * width * dtype.itemsize
    yield Case("rms_norm", f"T={rows} D={width}", "bytes", 2 * moved, lambda: rms_norm(x, norm, 1e-5),
               lambda: functional.rms_norm(x, (width,), dense_norm, 1e-5))  # fmt: skip
    yield Case("add_rms_norm", f"T={rows} D={width}", "bytes", 4 * moved, lambda: add_rms_norm(x, delta, norm, 1e-5),
               lambda: functional.rms_norm(x + delta, (width,), dense_norm, 1e-5))  # fmt: skip
    gate_up = torch.randn(rows, 2 * inner).to(dtype)
    yield Case("swiglu", f"T={rows} I={inner}", "bytes", 3 * rows * inner * dtype.itemsize, lambda: swiglu(gate_up),
               lambda: functional.silu(gate_up[:, :inner]) * gate_up[:, inner:])  # fmt: skip
    table, dense_table = _weight("embed", (config.vocab_size, width), dtype, packed=False)
    tokens = torch.randint(config.vocab_size, (rows,), dtype=torch.int32)
    yield Case("embedding", f"T={rows} D={width}", "bytes", 2 * moved, lambda: embedding(tokens, table),
               lambda: functional.embedding(tokens, dense_table))  # fmt: skip


def logit_cases(config: ModelConfig, dtype: torch.dtype, rows: int, sampled: int) -> Iterator[Case]:
    """The trainer's log-probabilities, forward and with their gradient, and the sampler's draw."""
    vocab, width = config.vocab_size, config.hidden_size
    head, dense = _weight("head", (vocab, width), dtype, packed=True)
    hidden, leaf = (torch.randn(rows, width).to(dtype) for _ in range(2))
    leaf.requires_grad_()
    targets = torch.randint(vocab, (rows,), dtype=torch.int32)
    dense_leaf, index = dense.clone().requires_grad_(), targets.long()

    def reference(h: Tensor, w: Tensor) -> Tensor:
        return -functional.cross_entropy(functional.linear(h, w).float(), index, reduction="none")

    def gradient() -> object:
        return torch.autograd.grad(token_logprob(leaf, head, targets)[0].sum(), leaf)

    work, shape = 2 * rows * vocab * width, f"T={rows} V={vocab} D={width}"
    yield Case("token_logprob", shape, "flops", work, lambda: token_logprob(hidden, head, targets),
               lambda: reference(hidden, dense))  # fmt: skip
    yield Case("token_logprob forward + backward", shape, "flops", 3 * work, gradient,
               lambda: torch.autograd.grad(reference(leaf, dense_leaf).sum(), [leaf, dense_leaf]))  # fmt: skip
    columns = max(1, vocab // SHARDS)
    shard = torch.randn(rows, columns)
    local = shard_targets(targets[:, None], 0, columns)
    statistics = shard_statistics(shard, local).repeat(SHARDS, 1, 1)
    yield Case(f"shard_logprob 1 of {SHARDS}", f"T={rows} V={columns}", "bytes", 4 * rows * columns,
               lambda: (shard_statistics(shard, local), fold_statistics(statistics)),
               lambda: (shard.logsumexp(-1), shard.gather(1, local.clamp_min(0).long())))  # fmt: skip
    logits = torch.randn(sampled, vocab) * 3
    ones, zeros = torch.ones(sampled), torch.zeros(sampled)
    none, counter = torch.zeros(sampled, dtype=torch.int32), torch.arange(sampled)
    yield Case("sample_token", f"R={sampled} V={vocab}", "bytes", 4 * sampled * vocab,
               lambda: sample_token(logits, ones, none, ones, zeros, counter, counter),
               lambda: torch.multinomial(logits.softmax(-1), 1))  # fmt: skip


def optimizer_cases(config: ModelConfig, dtype: torch.dtype) -> Iterator[Case]:
    """AdamW on the head's matrix (gradient, master and both moments read; master, moments and weight written), and the
    norm that clipping needs."""
    shape = (config.vocab_size, config.hidden_size)
    weight, dense = _weight("head", shape, dtype, packed=True)
    master, mean, square = dense.float(), torch.zeros(shape), torch.zeros(shape)
    weight.grad_buffer().normal_()
    parameter = torch.nn.Parameter(dense.float())
    parameter.grad = torch.randn(shape)
    fused = torch.optim.AdamW([parameter], lr=1e-5, fused=True)
    count, label = shape[0] * shape[1], f"N={shape[0]} K={shape[1]}"
    yield Case("adamw", label, "bytes", count * (16 + 12 + dtype.itemsize),
               lambda: adamw_(weight, master, mean, square, learning_rate=1e-5, beta1=0.9, beta2=0.95, eps=1e-8,
                              weight_decay=0.0, step=1),
               fused.step)  # fmt: skip
    grad = weight.grad_buffer()
    yield Case("squared_norm", label, "bytes", count * 4, lambda: squared_norm(grad),
               lambda: torch.dot(grad.view(-1), grad.view(-1)))  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Of all cases: `rows` tokens at a time where many go through at once."""

    rows: int
    few_rows: int  # of a decode step
    lengths: tuple[int, ...]  # of the sequences that attention sees
    decode: tuple[int, int, int]  # sequences, keys of each, and tokens of a page
    loss_rows: int


SIZES = {
    "cpu": Sizes(2048, 128, (512, 2048), decode=(128, 192, 16), loss_rows=512),
    "cuda": Sizes(8192, 64, (2048, 8192), decode=(64, 8192, 128), loss_rows=8192),
}
QUICK = Sizes(32, 32, (32,), decode=(32, 32, 16), loss_rows=32)


def all_cases(config: ModelConfig, dtype: torch.dtype, sizes: Sizes) -> Iterator[Case]:
    """Every op, on torch's default device."""
    yield from linear_cases(config, dtype, [1, sizes.few_rows, sizes.rows])
    yield from linear_gradient_cases(config, dtype, sizes.rows)
    yield from attention_cases(config, dtype, list(sizes.lengths), sizes.decode)
    yield from row_cases(config, dtype, sizes.rows)
    yield from logit_cases(config, dtype, sizes.loss_rows, sizes.few_rows)
    yield from optimizer_cases(config, dtype)


def on_device(device: str, cases: Iterator[Case]) -> Iterator[Case]:
    """The cases, each made while the device is torch's default one. They run while it is not, as the engine does."""
    while True:
        with torch.device(device):
            case = next(cases, None)
        if case is None:
            return
        yield case
