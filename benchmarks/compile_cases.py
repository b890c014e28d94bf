"""What a production model makes every Triton op launch: the kernels that `benchmarks.compile` compiles.

Tensors are of the real sizes and never touched, so a vocabulary of 131,072 costs nothing: launches are noted down, and
none runs.

# T tokens, V vocabulary, D model width, I feed-forward width, H query heads, K key/value heads, Dh head width
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.adamw import adamw_, squared_norm
from engine.kernels.attention import AttentionPlan, AttentionSpec, allocate_pages, attention
from engine.kernels.dtypes import MODEL_DTYPES, TRITON_DTYPES
from engine.kernels.embedding import embedding
from engine.kernels.linear import linear
from engine.kernels.op import OPS, use_backend
from engine.kernels.rms_norm import add_rms_norm, rms_norm
from engine.kernels.sample_token import sample_token
from engine.kernels.shard_logprob import fold_statistics, shard_logprob_backward, shard_statistics
from engine.kernels.swiglu import swiglu
from engine.kernels.token_logprob import token_logprob
from engine.kernels.triton.launch import Launch, collecting
from engine.kernels.weight import Weight

WIDTH, FEED_FORWARD, VOCABULARY = 4096, 14336, 131072
TOKENS, PAGE_SIZE = 512, 16
DTYPES = tuple(dtype for dtype in TRITON_DTYPES if dtype in MODEL_DTYPES.values())


@dataclass(frozen=True)
class CompileCase:
    """One op at production shapes: `run` calls its public functions for a model of the dtype, on the `backend`."""

    op: str
    run: Callable[[torch.dtype], None]
    backend: str = "triton"


def cases() -> list[CompileCase]:
    """Those whose op has Triton or Gluon kernels. Raises KeyError for an op that has kernels and no case."""
    return [
        CompileCase(name, RUN[name], backend.name)
        for name, op in OPS.items()
        for backend in op.backends
        if backend.name in ("triton", "hopper")
    ]


def collected(case: CompileCase, dtype: torch.dtype, processors: int, major: int) -> list[Launch]:
    """What the case launches in a model of `dtype`, on a GPU of so many multiprocessors and this capability; nothing
    where its backend does not compute in `dtype` or is for other GPUs."""
    with use_backend(case.backend), collecting(processors, major) as launches:
        backends = OPS[case.op].backends if case.op in OPS else []
        if not any(each.refusal(dtype, "cuda") for each in backends if each.name == case.backend):
            case.run(dtype)
    return launches


def _heads(head_dim: int) -> tuple[int, int]:
    """Query and key/value heads of a layer of this head width, as models have them."""
    return {64: (32, 8), 96: (32, 32), 128: (32, 8), 256: (16, 4)}[head_dim]


def _attention_of(dtype: torch.dtype, head_dim: int, special: bool = False, e4m3: bool = False) -> None:
    """Training and scoring without pages, then prefill and decode with them; `special` with norms and a window."""
    kv_dtype = torch.float8_e4m3fn if e4m3 else None
    spec = AttentionSpec(*_heads(head_dim), head_dim, window=1024 if special else None, kv_dtype=kv_dtype)
    rope = torch.empty(8192, head_dim)
    norm = Weight("norm", (head_dim,), dtype, packed=False) if special else None
    qkv = torch.empty(TOKENS, spec.row_size, dtype=dtype, requires_grad=True)
    _grads(attention(qkv, spec, rope, AttentionPlan.of_sequences([TOKENS]), q_norm=norm, k_norm=norm), qkv)
    keys, values = allocate_pages(256, PAGE_SIZE, spec, dtype)
    for new, context in ((TOKENS, TOKENS), (1, 4096)):
        plan = AttentionPlan()
        starts, contexts = (torch.tensor(numbers, dtype=torch.int32) for numbers in ([0, new], [context]))
        positions = torch.arange(context - new, context, dtype=torch.int32)
        plan.build(starts, contexts, positions, torch.zeros(1, context // PAGE_SIZE, dtype=torch.int32), PAGE_SIZE)
        attention(qkv.detach()[:new], spec, rope, plan, keys, values, norm, norm)


def _attention(dtype: torch.dtype) -> None:
    for head_dim in (64, 96, 128, 256):
        _attention_of(dtype, head_dim)
    _attention_of(dtype, 128, special=True)


def _attention_e4m3(dtype: torch.dtype) -> None:
    for head_dim in (64, 128, 256):
        _attention_of(dtype, head_dim, e4m3=True)


def _grads(output: Tensor, *inputs: Tensor) -> None:
    """Launches the backward."""
    torch.autograd.grad(output, inputs, torch.empty_like(output), allow_unused=True)


def _swiglu(dtype: torch.dtype) -> None:
    gate_up = torch.empty(TOKENS, 2 * FEED_FORWARD, dtype=dtype, requires_grad=True)
    _grads(swiglu(gate_up), gate_up)


def _matrix(dtype: torch.dtype, rows: int = WIDTH, columns: int = WIDTH) -> Weight:
    return Weight("matrix", (rows, columns), dtype, packed=True)


def _vector(dtype: torch.dtype, size: int = WIDTH) -> Weight:
    return Weight("vector", (size,), dtype, packed=False)


def _linear(dtype: torch.dtype) -> None:
    """Training, a prompt, a decode step, and the head's float32 logits."""
    weight, bias = _matrix(dtype), _vector(dtype)
    x = torch.empty(8 * TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    _grads(linear(x, weight, bias), x)
    for rows in (TOKENS, 32, 1):
        linear(x[:rows].detach(), weight)
    linear(x[:TOKENS].detach(), _matrix(dtype, VOCABULARY), out_dtype=torch.float32)


def _adamw(dtype: torch.dtype) -> None:
    weight, master = _matrix(dtype), torch.empty(WIDTH, WIDTH)
    settings = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    adamw_(weight, master, torch.empty_like(master), torch.empty_like(master), step=1, **settings)
    squared_norm(master)


def _embedding(dtype: torch.dtype) -> None:
    table, tokens = Weight("table", (VOCABULARY, WIDTH), dtype, packed=False), torch.zeros(TOKENS, dtype=torch.int32)
    for first_row in (None, VOCABULARY):
        out = embedding(tokens, table, first_row)
        out.backward(torch.empty_like(out))


def _token_logprob(dtype: torch.dtype) -> None:
    hidden = torch.empty(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    targets, inverse = torch.zeros(TOKENS, dtype=torch.int32), torch.empty(TOKENS)
    for inv_temperature in (None, inverse):
        logprobs, entropy = token_logprob(hidden, _matrix(dtype, VOCABULARY), targets, inv_temperature)
        (logprobs.sum() + entropy.sum()).backward()


def _sample_token(dtype: torch.dtype) -> None:
    logits, float_setting = torch.empty(TOKENS, VOCABULARY), torch.empty(TOKENS)
    top_k, seed = torch.zeros(TOKENS, dtype=torch.int32), torch.zeros(TOKENS, dtype=torch.int64)
    sample_token(logits, float_setting, top_k, float_setting, float_setting, seed, seed)


def _shard_logprob(dtype: torch.dtype) -> None:
    """Eight shards."""
    logits, targets = torch.empty(TOKENS, VOCABULARY // 8), torch.zeros(TOKENS, dtype=torch.int32)
    inverse = torch.empty(TOKENS)
    statistics = shard_statistics(logits, targets[:, None], inverse)
    _, entropy, stats = fold_statistics(torch.stack([statistics] * 8))
    shard_logprob_backward(logits, targets, inverse, stats, entropy, inverse, inverse, dtype)


def _rms_norm(dtype: torch.dtype) -> None:
    x = torch.empty(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    weight = _vector(dtype)
    rms_norm(x.detach(), weight, 1e-5)
    total, out = add_rms_norm(x, torch.empty_like(x), weight, 1e-5)
    torch.autograd.backward([total, out], [torch.empty_like(total), torch.empty_like(out)])


RUN: dict[str, Callable[[torch.dtype], None]] = {
    "adamw": _adamw,
    "attention": _attention,
    "attention_e4m3": _attention_e4m3,
    "embedding": _embedding,
    "linear": _linear,
    "rms_norm": _rms_norm,
    "sample_token": _sample_token,
    "shard_logprob": _shard_logprob,
    "swiglu": _swiglu,
    "token_logprob": _token_logprob,
}
