"""Bytes that one rank holds, kind by kind: pure arithmetic over the shapes that the engine lays out.

# T tokens of a micro-batch, S rows of it that a rank keeps between matmuls, D model width, V vocabulary, H query heads,
# K key/value heads, Dh head width, I feed-forward width; all but D are a rank's; e bytes of an element
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from engine.architectures import architecture_of
from engine.config import ModelConfig
from engine.kernels.attention import AttentionSpec, allocate_pages
from engine.kernels.dtypes import KV_DTYPES
from engine.kernels.memory import num_bytes
from engine.kernels.token_logprob import logits_rows
from engine.kernels.weight import storage_shape
from engine.planner.share import Share

FP32 = 4  # bytes
SAMPLING_LOGITS_BYTES = 64 << 20


@dataclass(frozen=True)
class Held:
    """A kind of weight that a rank holds, and how many of it; a matmul reads those that are `packed`."""

    name: str
    shape: tuple[int, ...]
    packed: bool
    count: int = 1

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape) * self.count


def layer_weights(share: Share) -> list[Held]:
    """The weights of a layer's shard, in the model's order."""
    model, row = share.model, architecture_of(share.model)
    width, inner, mixed = share.D, share.I, share.H * share.Dh
    found = [
        Held("qkv", (share.qkv, width), True),
        Held("qkv bias", (share.qkv,), False) if row.has_qkv_bias(model) else None,
        Held("out", (width, mixed), True),
        Held("out bias", (width,), False) if row.has_out_bias(model) else None,
        Held("q norm", (share.Dh,), False) if row.qk_norm else None,
        Held("k norm", (share.Dh,), False) if row.qk_norm else None,
        Held("gate_up", (2 * inner, width), True),
        Held("gate_up bias", (2 * inner,), False) if row.has_mlp_bias(model) else None,
        Held("down", (width, inner), True),
        Held("down bias", (width,), False) if row.has_mlp_bias(model) else None,
        Held("input norm", (width,), False),
        Held("post norm", (width,), False),
    ]
    return [weight for weight in found if weight]


def end_weights(share: Share) -> list[Held]:
    """The embedding on the first stage, the last norm and the head on the last. A tied head is the embedding where one
    rank holds both, and a copy of it otherwise."""
    tied, shape = share.model.tie_word_embeddings, (share.V, share.D)
    found = [Held("embedding", shape, tied)] if share.is_first else []
    found += [Held("last norm", (share.D,), False)] if share.is_last else []
    return found + ([Held("head", shape, True)] if share.is_last and not (share.is_first and tied) else [])


def held_weights(share: Share) -> list[Held]:
    """All weights of a rank: those of each of its layers and those of the ends."""
    return [replace(weight, count=share.num_layers) for weight in layer_weights(share)] + end_weights(share)


def weight_bytes(held: list[Held], dtype: torch.dtype) -> int:
    """Compute weights: the elements of each one's storage, whole panels of 16 rows (and in bf16 of an even number of
    columns) where it is packed, times e."""
    return sum(weight.count * num_bytes(storage_shape(weight.shape, dtype, weight.packed), dtype) for weight in held)


def num_gradients(share: Share) -> int:
    """Elements of a lane's gradients on this rank: N x K of each weight, and of a tied head's again where it is the
    embedding, because the two are summed apart."""
    together = share.model.tie_word_embeddings and share.is_first and share.is_last
    return sum(weight.num_elements for weight in held_weights(share)) + together * share.V * share.D


def gradient_bytes(share: Share) -> int:
    """Gradients of this rank's lane, fp32 and dense: 4 bytes x `num_gradients`, for each context lane of it."""
    return FP32 * num_gradients(share) * share.context_lanes


def layer_activation_bytes(share: Share) -> int:
    """What the backward of one layer finds saved for one micro-batch.

    e S x 4D: both sums of the residual stream and both norms of them; 8 S: the norms' 1/rms; e T x (qkv + H Dh + 3 I):
    qkv, attention's output, gate and up, their product; 4 T H: the logarithm of each softmax's sum. With context
    parallelism e x 2 K Dh for each row whose keys and values were gathered.
    """
    e = share.e
    between = share.S * (4 * share.D * e + 2 * FP32)
    gathered = e * share.rows.keys * 2 * share.K * share.Dh
    return between + share.T * (e * (share.qkv + share.H * share.Dh + 3 * share.I) + FP32 * share.H) + gathered


def chunk_activation_bytes(share: Share, chunk: int) -> int:
    """What one micro-batch keeps in one chunk until its backward.

    Without activation checkpointing: `layer_activation_bytes` x layers. With it: each layer's inputs, e S x 2D (the
    first of a chunk has one, e S D). The chunk that ends in the loss keeps the last sum and its 1/rms, (e D + 4) S, the
    gathered hidden states, e D x S tp (e D T without sequence parallelism), and 20 bytes a token of the
    log-probability's; the one that begins with the embedding keeps 4 bytes a token, its id.
    """
    e, width = share.e, share.D
    if share.config.activation_checkpointing:
        kept = (2 * len(share.chunks[chunk]) - 1) * share.S * width * e
    else:
        kept = len(share.chunks[chunk]) * layer_activation_bytes(share)
    if share.is_first and chunk == 0:
        kept += 4 * share.T
    if share.is_last and chunk == len(share.chunks) - 1:
        whole = share.S * share.mesh.tp.size if share.placement.sequence_parallel else share.T
        kept += share.S * (width * e + FP32) + whole * width * e + 5 * FP32 * share.T
    return kept


def activation_bytes(share: Share, in_flight: int) -> int:
    """Activations at the schedule's peak: `in_flight` (micro-batch, chunk) pairs x the largest chunk's; with
    checkpointing one layer's more, the one being computed again. "zero_bubble" puts the weight gradients of stage r off
    by r micro-batches and keeps what they read beside the activations: per layer e T x (qkv + 2 D + 2 I) of output
    gradients, and the inputs of two column-parallel matmuls with all their rows, e (T - S) x 2 D more."""
    each = max(chunk_activation_bytes(share, chunk) for chunk in range(len(share.chunks)))
    again = layer_activation_bytes(share) if share.config.activation_checkpointing else 0
    waiting = 0
    if share.config.parallel.schedule == "zero_bubble":
        elements = share.T * (share.qkv + 2 * share.D + 2 * share.I) + (share.T - share.S) * 2 * share.D
        waiting = min(share.mesh.pp.index, in_flight) * share.num_layers * elements * share.e
    return in_flight * each + again + waiting


def working_bytes(share: Share) -> int:
    """What a backward needs beside what was kept, an estimate of its widest moment: e T x 3 I, the gradients of
    SwiGLU's input and output (or e T x (qkv + 2 H Dh), attention's, where that is more), and e T x 3 D of the residual
    stream's; with tensor parallelism 2 x 4 T D, partial sums on their way out and in."""
    sums = 2 * FP32 * share.T * share.D if share.mesh.tp.size > 1 else 0
    widest = max(3 * share.I, share.qkv + 2 * share.H * share.Dh)
    return share.e * share.T * (widest + 3 * share.D) + sums


def logits_bytes(share: Share) -> int:
    """Logits on the last stage: a chunk of at most `logits_rows` tokens, 4 + e bytes each (in fp32 4: the gradient
    takes the logits' place); elsewhere 0."""
    if not share.is_last:
        return 0
    device = torch.device("cuda" if share.config.device == "cuda" else "cpu")
    rows = min(share.T, logits_rows(share.V, device))
    return rows * share.V * (FP32 if share.e == FP32 else FP32 + share.e)


def sampling_bytes(share: Share) -> int:
    """The recorded forward of each chunk for a sampling step of B = max_batch_tokens rows, an estimate of its widest
    moment: e B x (6 D + qkv + H Dh + 3 I), with tensor parallelism 4 B D for a partial sum; e B D for a stream that
    comes from another chunk; on the last stage 64 MiB of logits at most."""
    rows, num_chunks = share.config.max_batch_tokens, len(share.chunks)
    sums = FP32 * rows * share.D if share.mesh.tp.size > 1 else 0
    widest = share.e * rows * (6 * share.D + share.qkv + share.H * share.Dh + 3 * share.I) + sums
    streams = share.e * rows * share.D * (num_chunks - share.is_first)
    return num_chunks * widest + streams + (SAMPLING_LOGITS_BYTES if share.is_last else 0)


def rotary_bytes(model: ModelConfig) -> int:
    """The table of cosines and sines: 4 bytes x max_position_embeddings x Dh."""
    return num_bytes((model.max_position_embeddings, model.head_dim), torch.float32)


def kv_token_bytes(share: Share) -> int:
    """Keys and values of one token in all layers of this rank: pages as the sampler allocates them, over the tokens of
    a page: e x K x (Dh rounded up to 32 in bf16, + Dh) x layers."""
    page_size = share.config.page_size
    with torch.device("meta"):
        spec = AttentionSpec(share.H, share.K, share.Dh, kv_dtype=KV_DTYPES[share.config.kv_dtype])
        pages = allocate_pages(1, page_size, spec, share.dtype)
    page = sum(tensor.numel() * tensor.element_size() for tensor in pages)
    return page // page_size * share.num_layers
