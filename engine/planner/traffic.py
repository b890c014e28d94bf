"""Bytes that one rank sends in a training step, kind by kind: each function counts what its namesake sends.

Every collective is an all-to-all (`collectives.py`), so a rank sends each of its p - 1 peers the same amount; receiving
is its mirror image.

# T tokens of a micro-batch, S = ceil(T / p) rows of a share, D model width, p tensor-parallel ranks, e bytes of an
# element, M micro-batches
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.architectures import architecture_of
from engine.config import EngineConfig, ModelConfig
from engine.parallel.collectives import ONE_SHOT_BYTES
from engine.parallel.shards import Placement, head_shard
from engine.planner.footprint import (
    DTYPES,
    FP32,
    Held,
    chunks,
    held_weights,
    micro_batch_rows,
    share_elements,
    weight_bytes,
    widths,
)

STATISTICS_BYTES = 4 * 8  # float64 numbers of a row with one target: `shard_statistics`


def gather_bytes(block: int, num_ranks: int) -> int:
    """all_gather: a rank's block to each peer, block x (p - 1)."""
    return block * (num_ranks - 1)


def scatter_bytes(whole: int, num_ranks: int) -> int:
    """reduce_scatter and all_to_all: 1 / p of the whole to each peer, whole x (p - 1) / p."""
    return whole // num_ranks * (num_ranks - 1)


def reduce_bytes(elements: int, itemsize: int, num_ranks: int) -> int:
    """all_reduce: up to 64 KiB an all_gather; above it a reduce_scatter in the tensor's type, an all_gather in fp32."""
    if num_ranks == 1:
        return 0
    if elements * itemsize <= ONE_SHOT_BYTES:
        return gather_bytes(elements * itemsize, num_ranks)
    share = -(-elements // num_ranks)
    return gather_bytes(share * itemsize, num_ranks) + gather_bytes(share * FP32, num_ranks)


@dataclass(frozen=True)
class Sizes:
    """What tensor-parallel traffic is made of: p ranks, T x D elements, S x D of a share (or None), e."""

    ranks: int
    whole: int
    share: int | None
    e: int


def sizes(model: ModelConfig, config: EngineConfig, placement: Placement) -> Sizes:
    """Those of one micro-batch on this rank."""
    tokens, rows = micro_batch_rows(config, placement)
    share = rows * model.hidden_size if placement.sequence_parallel else None
    return Sizes(placement.mesh.tp.size, tokens * model.hidden_size, share, DTYPES[config.dtype].itemsize)


def gather_rows_bytes(n: Sizes) -> int:
    """All rows from the shares of them: e S D (p - 1); 0 where every rank has all rows."""
    return 0 if n.share is None else gather_bytes(n.share * n.e, n.ranks)


def sum_bytes(n: Sizes, itemsize: int) -> int:
    """Partial sums [T, D] over ranks: to shares of the rows a reduce_scatter, itemsize x S D (p - 1), else an
    all_reduce."""
    return reduce_bytes(n.whole, itemsize, n.ranks) if n.share is None else gather_bytes(n.share * itemsize, n.ranks)


def layer_forward_bytes(n: Sizes) -> int:
    """Two column-parallel matmuls gather rows, two row-parallel ones sum in fp32."""
    return 2 * gather_rows_bytes(n) + 2 * sum_bytes(n, FP32)


def layer_column_backward_bytes(n: Sizes) -> int:
    """The backward of two column-parallel matmuls: their inputs' rows gathered again, their input gradients summed in
    the model's type; it runs while the same matmuls' gradients are computed."""
    return 2 * gather_rows_bytes(n) + 2 * sum_bytes(n, n.e)


def layer_row_backward_bytes(n: Sizes) -> int:
    """The backward of two row-parallel matmuls: the rows of their output gradients gathered."""
    return 2 * gather_rows_bytes(n)


def ends_forward_bytes(model: ModelConfig, config: EngineConfig, placement: Placement) -> int:
    """The embedding's sum on the first stage; on the last all rows of the hidden states, and 32 T bytes of the
    softmax's statistics to each rank."""
    n, mesh = sizes(model, config, placement), placement.mesh
    first = sum_bytes(n, n.e) if mesh.pp.index == 0 else 0
    if mesh.pp.index < mesh.pp.size - 1:
        return first
    statistics = STATISTICS_BYTES * micro_batch_rows(config, placement)[0]
    return first + gather_rows_bytes(n) + gather_bytes(statistics, n.ranks)


def ends_backward_bytes(model: ModelConfig, config: EngineConfig, placement: Placement) -> int:
    """On the first stage the rows of the embedding's gradient, on the last the sum of the hidden states'."""
    n, mesh = sizes(model, config, placement), placement.mesh
    first = gather_rows_bytes(n) if mesh.pp.index == 0 else 0
    return first + (sum_bytes(n, n.e) if mesh.pp.index == mesh.pp.size - 1 else 0)


def stage_tensor_bytes(model: ModelConfig, config: EngineConfig, placement: Placement) -> int:
    """What one micro-batch hands from chunk to chunk, forward or backward: e S D."""
    return micro_batch_rows(config, placement)[1] * model.hidden_size * DTYPES[config.dtype].itemsize


def pipeline_bytes(model: ModelConfig, config: EngineConfig, placement: Placement, micro_batches: int) -> int:
    """Streams forward from every chunk but the model's last, gradients backward from every chunk but its first:
    M x (chunks that send each) x e S D."""
    pp, num_chunks = placement.mesh.pp, len(chunks(model, placement))
    if pp.size == 1:
        return 0
    sends = 2 * num_chunks - (pp.index == pp.size - 1) - (pp.index == 0)
    return micro_batches * sends * stage_tensor_bytes(model, config, placement)


def context_bytes(model: ModelConfig, config: EngineConfig, placement: Placement) -> int:
    """Keys and values of one micro-batch to the other context-parallel ranks, per layer and direction: e T 2 K Dh
    (cp - 1). The backward sends their gradients back, as many numbers."""
    w, mesh = widths(model, placement.mesh), placement.mesh
    tokens, _ = micro_batch_rows(config, placement)
    return gather_bytes(DTYPES[config.dtype].itemsize * tokens * 2 * w.K * w.Dh, mesh.cp.size)


def shared_gradient_bytes(model: ModelConfig, placement: Placement) -> int:
    """Gradients of rows that several tensor-parallel ranks hold, each with its part, to all of them: 4 bytes (p - 1) x
    the elements of replicated keys and values, of q/k norms, and under sequence parallelism of every norm and of the
    biases behind a row-parallel matmul."""
    mesh, w = placement.mesh, widths(model, placement.mesh)
    row, num_layers = architecture_of(model), sum(len(layers) for layers in chunks(model, placement))
    elements = 0
    if head_shard(model, mesh.tp.size, mesh.tp.index).replicas > 1:
        elements += num_layers * 2 * w.K * w.Dh * (w.D + row.has_qkv_bias(model))
    if row.qk_norm:
        elements += num_layers * 2 * w.Dh
    if placement.sequence_parallel:
        vectors = 2 + row.has_out_bias(model) + row.has_mlp_bias(model)
        elements += (num_layers * vectors + (mesh.pp.index == mesh.pp.size - 1)) * w.D
    return gather_bytes(FP32 * elements, mesh.tp.size)


def gradient_reduce_bytes(held: list[Held], placement: Placement) -> int:
    """Gradients to the ranks whose share of the optimizer they are: 4 bytes x (elements - this rank's share)."""
    mesh = placement.mesh
    return FP32 * (sum(weight.num_elements for weight in held) - share_elements(held, mesh.data.size, mesh.data.index))


def weight_gather_bytes(held: list[Held], placement: Placement, config: EngineConfig) -> int:
    """This rank's share of the updated compute weights to the others: bytes of the weights / (dp cp) x (dp cp - 1)."""
    return scatter_bytes(weight_bytes(held, DTYPES[config.dtype]), placement.mesh.data.size)


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends to its peers of one axis of the mesh in a step."""

    kind: str
    axis: str
    num_bytes: int


def step_traffic(model: ModelConfig, config: EngineConfig, placement: Placement, micro_batches: int) -> list[Traffic]:
    """All that a rank sends in a step of M micro-batches and one optimizer step, kind by kind; what is 0 is left out.

    With activation checkpointing the layers' forward traffic is sent twice.
    """
    n, held = sizes(model, config, placement), held_weights(model, placement)
    num_layers = sum(len(layers) for layers in chunks(model, placement))
    forwards = 1 + config.activation_checkpointing
    forward = forwards * num_layers * layer_forward_bytes(n) + ends_forward_bytes(model, config, placement)
    backward = num_layers * (layer_column_backward_bytes(n) + layer_row_backward_bytes(n))
    backward += ends_backward_bytes(model, config, placement)
    keys = num_layers * context_bytes(model, config, placement)
    found = [
        Traffic("forward: rows and partial sums", "tp", micro_batches * forward),
        Traffic("backward: rows and partial sums", "tp", micro_batches * backward),
        Traffic("gradients of shared rows", "tp", shared_gradient_bytes(model, placement)),
        Traffic("keys and values", "cp", micro_batches * forwards * keys),
        Traffic("gradients of keys and values", "cp", micro_batches * keys),
        Traffic("streams and their gradients", "pp", pipeline_bytes(model, config, placement, micro_batches)),
        Traffic("gradients to their owners", "data", gradient_reduce_bytes(held, placement)),
        Traffic("updated weights", "data", weight_gather_bytes(held, placement, config)),
    ]
    return [traffic for traffic in found if traffic.num_bytes]
