"""Every op at the shapes that a model gives it, beside what torch offers for the same: the rows of `kernels` and
`exactness_cost`.

# T tokens, N columns, K width, V vocabulary, D model width
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.attention_cases import attention_cases
from benchmarks.case import Case
from benchmarks.flash_attention import FlashAttention
from engine.config import ModelConfig
from engine.kernels.adamw import adamw_, squared_norm
from engine.kernels.embedding import embedding
from engine.kernels.linear import linear, linear_grad_input, linear_grad_weight_
from engine.kernels.rms_norm import add_rms_norm, rms_norm
from engine.kernels.sample_token import sample_token
from engine.kernels.shard_logprob import fold_statistics, shard_statistics, shard_targets
from engine.kernels.swiglu import swiglu
from engine.kernels.token_logprob import token_logprob
from engine.kernels.weight import Weight

SHARDS = 8  # of the vocabulary, where one of them is measured


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


def all_cases(
    config: ModelConfig,
    dtype: torch.dtype,
    sizes: Sizes,
    backends: Sequence[str] = (),
    peers: Sequence[FlashAttention] = (),
) -> Iterator[Case]:
    """Every op, on torch's default device; attention on our `backends` (see `attention_cases`), beside `peers` too."""
    yield from linear_cases(config, dtype, [1, sizes.few_rows, sizes.rows])
    yield from linear_gradient_cases(config, dtype, sizes.rows)
    yield from attention_cases(config, dtype, list(sizes.lengths), sizes.decode, backends, peers)
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
