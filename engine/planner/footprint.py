"""Bytes that one rank holds, kind by kind: pure arithmetic over the shapes that the engine lays out.

# T tokens of a micro-batch, S rows of it that a rank keeps between matmuls, D model width, V vocabulary, H query heads,
# K key/value heads, Dh head width, I feed-forward width; V, H, K and I are a rank's; e bytes of an element
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from engine.architectures import architecture_of
from engine.config import EngineConfig, ModelConfig
from engine.kernels.attention import AttentionSpec, allocate_pages
from engine.kernels.memory import num_bytes
from engine.kernels.token_logprob import LOGITS_ELEMENTS
from engine.kernels.weight import storage_shape
from engine.parallel.mesh import Mesh
from engine.parallel.shards import Placement, head_shard, layer_chunks, row_shard, row_share

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # float64 is for tests of the engine, not for plans
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


@dataclass(frozen=True)
class Widths:
    """A rank's share of the sizes of a layer and of a micro-batch."""

    D: int
    H: int
    K: int
    Dh: int
    I: int  # noqa: E741 (the legend's name)
    V: int
    qkv: int  # (H + 2 K) Dh


def widths(model: ModelConfig, mesh: Mesh) -> Widths:
    """The sizes of one tensor-parallel rank. Raises ConfigError where heads, panels of I or of V do not divide."""
    heads = head_shard(model, mesh.tp.size, mesh.tp.index)
    h, k = heads.heads.size, heads.kv_heads.size
    inner = row_shard(model.intermediate_size, mesh.tp.size, mesh.tp.index).size
    vocabulary = row_shard(model.vocab_size, mesh.tp.size, mesh.tp.index).size
    return Widths(model.hidden_size, h, k, model.head_dim, inner, vocabulary, (h + 2 * k) * model.head_dim)


def chunks(model: ModelConfig, placement: Placement) -> list[range]:
    """The layers of each chunk of this rank. Raises ConfigError where there are fewer layers than chunks."""
    pp = placement.mesh.pp
    return layer_chunks(model.num_hidden_layers, pp.size, placement.chunks_per_stage, pp.index)


def held_weights(model: ModelConfig, placement: Placement) -> list[Held]:
    """The weights of a rank: its layers' shards, the embedding on the first stage, the last norm and the head on the
    last. A tied head is the embedding where one rank holds both, and a copy of it otherwise."""
    row, w = architecture_of(model), widths(model, placement.mesh)
    mesh, num_layers = placement.mesh, sum(len(layers) for layers in chunks(model, placement))
    first, last = mesh.pp.index == 0, mesh.pp.index == mesh.pp.size - 1
    held = [
        Held("qkv", (w.qkv, w.D), True, num_layers),
        Held("out", (w.D, w.H * w.Dh), True, num_layers),
        Held("gate_up", (2 * w.I, w.D), True, num_layers),
        Held("down", (w.D, w.I), True, num_layers),
        Held("norm", (w.D,), False, 2 * num_layers + last),
    ]
    biases = [(row.has_qkv_bias(model), w.qkv), (row.has_out_bias(model), w.D)]
    biases += [(row.has_mlp_bias(model), 2 * w.I), (row.has_mlp_bias(model), w.D)]
    held += [Held("bias", (size,), False, num_layers) for present, size in biases if present]
    if row.qk_norm:
        held.append(Held("qk_norm", (w.Dh,), False, 2 * num_layers))
    if first:
        held.append(Held("embedding", (w.V, w.D), model.tie_word_embeddings))
    if last and not (first and model.tie_word_embeddings):
        held.append(Held("head", (w.V, w.D), True))
    return held


def weight_bytes(held: list[Held], dtype: torch.dtype) -> int:
    """Compute weights: the elements of each one's storage, whole panels of 16 rows (and in bf16 of an even number of
    columns) where it is packed, times e."""
    return sum(weight.count * num_bytes(storage_shape(weight.shape, dtype, weight.packed), dtype) for weight in held)


def gradient_bytes(held: list[Held]) -> int:
    """Gradients of this rank's lane, fp32 and dense: 4 bytes x N x K of each weight."""
    return sum(FP32 * weight.num_elements for weight in held)


def share_elements(held: list[Held], num_shares: int, index: int) -> int:
    """Elements of one rank's share of the optimizer (ZeRO-1, arXiv 1910.02054): each weight's rows are dealt over the
    dp x cp ranks that hold it, in panels of 16."""
    rows = (row_share(weight.shape[0], num_shares, index).size for weight in held)
    return sum(n * math.prod(weight.shape[1:]) * weight.count for n, weight in zip(rows, held, strict=True))


def gradient_sum_bytes(held: list[Held], mesh: Mesh) -> int:
    """The sum of all lanes, sharded: 4 bytes x `share_elements`; the lane's own buffer where nothing is sharded."""
    return FP32 * share_elements(held, mesh.data.size, mesh.data.index) if mesh.data.size > 1 else 0


def optimizer_bytes(held: list[Held], mesh: Mesh) -> int:
    """fp32 master weights and two moments: 12 bytes x `share_elements`."""
    return 3 * FP32 * share_elements(held, mesh.data.size, mesh.data.index)


def layer_activation_bytes(model: ModelConfig, config: EngineConfig, placement: Placement) -> int:
    """What the backward of one layer finds saved for one micro-batch.

    e S x 4D: both sums of the residual stream and both norms of them; 8 S: the norms' 1/rms; e T x (qkv + H Dh + 3 I):
    qkv, attention's output, gate and up, their product; 4 T H: the logarithm of each softmax's sum.
    """
    w, e = widths(model, placement.mesh), DTYPES[config.dtype].itemsize
    tokens, rows = micro_batch_rows(config, placement)
    between = rows * (4 * w.D * e + 2 * FP32)
    return between + tokens * (e * (w.qkv + w.H * w.Dh + 3 * w.I) + FP32 * w.H)


def micro_batch_rows(config: EngineConfig, placement: Placement) -> tuple[int, int]:
    """(T, S): tokens of a micro-batch on this rank, ceil(train_batch_tokens / cp), and the rows of them between
    matmuls, ceil(T / tp) under sequence parallelism, else T."""
    mesh = placement.mesh
    tokens = -(-config.train_batch_tokens // mesh.cp.size)
    return tokens, -(-tokens // mesh.tp.size) if placement.sequence_parallel else tokens


def chunk_activation_bytes(model: ModelConfig, config: EngineConfig, placement: Placement, chunk: int) -> int:
    """What one micro-batch keeps in one chunk until its backward.

    Without activation checkpointing: `layer_activation_bytes` x layers. With it: each layer's inputs, e S x 2D (the
    first of a chunk has one, e S D), and the layer being computed again. The chunk that ends in the loss keeps the last
    sum and its 1/rms, (e D + 4) S, and per token the hidden state of the head, e D, and 20 bytes of the
    log-probability's; the one that begins with the embedding keeps 4 bytes a token, its id.
    """
    w, e = widths(model, placement.mesh), DTYPES[config.dtype].itemsize
    mesh, layers = placement.mesh, chunks(model, placement)
    tokens, rows = micro_batch_rows(config, placement)
    if config.activation_checkpointing:
        kept = (2 * len(layers[chunk]) - 1) * rows * w.D * e
    else:
        kept = len(layers[chunk]) * layer_activation_bytes(model, config, placement)
    if mesh.pp.index == 0 and chunk == 0:
        kept += 4 * tokens
    if mesh.pp.index == mesh.pp.size - 1 and chunk == len(layers) - 1:
        kept += rows * (w.D * e + FP32) + tokens * (w.D * e + 5 * FP32)
    return kept


def activation_bytes(model: ModelConfig, config: EngineConfig, placement: Placement, in_flight: int) -> int:
    """Activations at the schedule's peak: `in_flight` (micro-batch, chunk) pairs x the largest chunk's; with
    checkpointing one layer's more, the one being computed again. "zero_bubble" puts the weight gradients of stage r off
    by r micro-batches and keeps what they read beside the activations: per layer e T x (qkv + 2 D + 2 I) of output
    gradients, and the inputs of two column-parallel matmuls with all their rows, e (T - S) x 2 D more."""
    layers = chunks(model, placement)
    each = max(chunk_activation_bytes(model, config, placement, chunk) for chunk in range(len(layers)))
    again = layer_activation_bytes(model, config, placement) if config.activation_checkpointing else 0
    waiting = 0
    if config.parallel.schedule == "zero_bubble":
        w, (tokens, rows) = widths(model, placement.mesh), micro_batch_rows(config, placement)
        elements = tokens * (w.qkv + 2 * w.D + 2 * w.I) + (tokens - rows) * 2 * w.D
        waiting = min(placement.mesh.pp.index, in_flight) * len(layers[0]) * elements * DTYPES[config.dtype].itemsize
    return in_flight * each + again + waiting


def working_bytes(model: ModelConfig, config: EngineConfig, placement: Placement) -> int:
    """What a backward needs beside what was kept, an estimate of its widest moment: e T x 3 I, the gradients of
    SwiGLU's input and output, and e T x 3 D of the residual stream's; with tensor parallelism 2 x 4 T D, partial sums
    on their way out and in."""
    w, e = widths(model, placement.mesh), DTYPES[config.dtype].itemsize
    tokens, _ = micro_batch_rows(config, placement)
    sums = 2 * FP32 * tokens * w.D if placement.mesh.tp.size > 1 else 0
    return e * tokens * (max(3 * w.I, w.qkv + 2 * w.H * w.Dh) + 3 * w.D) + sums


def logits_bytes(model: ModelConfig, config: EngineConfig, placement: Placement) -> int:
    """Logits on the last stage: a chunk of at most max(16, 16 Mi / V) tokens, (4 + e) bytes each (the gradient takes
    the logits' place in fp32); elsewhere 0."""
    mesh = placement.mesh
    if mesh.pp.index < mesh.pp.size - 1:
        return 0
    vocabulary, e = widths(model, mesh).V, DTYPES[config.dtype].itemsize
    rows = min(micro_batch_rows(config, placement)[0], max(16, LOGITS_ELEMENTS // vocabulary))
    return rows * vocabulary * (FP32 if e == FP32 else FP32 + e)


def sampling_bytes(model: ModelConfig, config: EngineConfig, placement: Placement) -> int:
    """The recorded forward of a sampling step of B = max_batch_tokens rows, an estimate of its widest moment:
    e B x (6 D + qkv + H Dh + 3 I), with tensor parallelism 4 B D for a partial sum; on the last stage 64 MiB of logits
    at most."""
    w, e, mesh = widths(model, placement.mesh), DTYPES[config.dtype].itemsize, placement.mesh
    rows = config.max_batch_tokens
    sums = FP32 * rows * w.D if mesh.tp.size > 1 else 0
    last = SAMPLING_LOGITS_BYTES if mesh.pp.index == mesh.pp.size - 1 else 0
    return e * rows * (6 * w.D + w.qkv + w.H * w.Dh + 3 * w.I) + sums + last


def rotary_bytes(model: ModelConfig) -> int:
    """The table of cosines and sines: 4 bytes x max_position_embeddings x Dh."""
    return num_bytes((model.max_position_embeddings, model.head_dim), torch.float32)


def kv_token_bytes(model: ModelConfig, config: EngineConfig, placement: Placement) -> int:
    """Keys and values of one token in all layers of this rank: pages as the sampler allocates them, over the tokens of
    a page: e x K x (Dh rounded up to 32 in bf16, + Dh) x layers."""
    w = widths(model, placement.mesh)
    with torch.device("meta"):
        pages = allocate_pages(1, config.page_size, AttentionSpec(w.H, w.K, w.Dh), DTYPES[config.dtype])
    page = sum(tensor.numel() * tensor.element_size() for tensor in pages)
    return page // config.page_size * sum(len(layers) for layers in chunks(model, placement))
