"""Bytes that one rank sends in a training step, kind by kind: each function counts what its namesake sends.

Every collective is an all-to-all (`collectives.py`), so a rank sends each of its p - 1 peers the same amount; receiving
is its mirror image.

# T tokens of a micro-batch, S = ceil(T / p) rows of a share, D model width, p tensor-parallel ranks, e bytes of an
# element, M micro-batches
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.architectures import architecture_of
from engine.parallel.collectives import ONE_SHOT_BYTES
from engine.planner import optimizer
from engine.planner.footprint import FP32, num_gradients
from engine.planner.share import Share

STATISTICS_BYTES = 4 * 8  # float64 numbers of a row with one target: `shard_statistics`


def gather_bytes(block: int, num_ranks: int) -> int:
    """all_gather: a rank's block to each peer, block x (p - 1)."""
    return block * (num_ranks - 1)


def reduce_bytes(elements: int, itemsize: int, num_ranks: int) -> int:
    """all_reduce: up to 64 KiB an all_gather; above it a reduce_scatter in the tensor's type, an all_gather in fp32."""
    if num_ranks == 1:
        return 0
    if elements * itemsize <= ONE_SHOT_BYTES:
        return gather_bytes(elements * itemsize, num_ranks)
    share = -(-elements // num_ranks)
    return gather_bytes(share * itemsize, num_ranks) + gather_bytes(share * FP32, num_ranks)


def gather_rows_bytes(share: Share) -> int:
    """All rows from the shares of them: e S D (p - 1); 0 where every rank has all rows."""
    return gather_bytes(share.S * share.D * share.e, share.mesh.tp.size) if share.placement.sequence_parallel else 0


def sum_bytes(share: Share, itemsize: int) -> int:
    """Partial sums [T, D] over ranks: to shares of the rows a reduce_scatter, itemsize x S D (p - 1), else an
    all_reduce."""
    if share.placement.sequence_parallel:
        return gather_bytes(share.S * share.D * itemsize, share.mesh.tp.size)
    return reduce_bytes(share.T * share.D, itemsize, share.mesh.tp.size)


def layer_forward_bytes(share: Share) -> int:
    """Two column-parallel matmuls gather rows, two row-parallel ones sum in fp32."""
    return 2 * gather_rows_bytes(share) + 2 * sum_bytes(share, FP32)


def layer_column_backward_bytes(share: Share) -> int:
    """The backward of two column-parallel matmuls: their inputs' rows gathered again, their input gradients summed in
    the model's type; it runs while the same matmuls' gradients are computed."""
    return 2 * gather_rows_bytes(share) + 2 * sum_bytes(share, share.e)


def layer_row_backward_bytes(share: Share) -> int:
    """The backward of two row-parallel matmuls: the rows of their output gradients gathered."""
    return 2 * gather_rows_bytes(share)


def ends_forward_bytes(share: Share) -> int:
    """The embedding's sum on the first stage; on the last all rows of the hidden states, and 32 T bytes of the
    softmax's statistics to each rank."""
    first = sum_bytes(share, share.e) if share.is_first else 0
    last = gather_rows_bytes(share) + gather_bytes(STATISTICS_BYTES * share.T, share.mesh.tp.size)
    return first + (last if share.is_last else 0)


def ends_backward_bytes(share: Share) -> int:
    """On the first stage the rows of the embedding's gradient, on the last the sum of the hidden states'."""
    first = gather_rows_bytes(share) if share.is_first else 0
    return first + (sum_bytes(share, share.e) if share.is_last else 0)


def stream_bytes(share: Share) -> int:
    """What one micro-batch hands from chunk to chunk, forward or backward: e S D."""
    return share.S * share.D * share.e


def pipeline_bytes(share: Share, micro_batches: int) -> int:
    """Streams forward from every chunk but the model's last, gradients backward from every chunk but its first:
    M x (chunks that send each) x e S D."""
    if share.mesh.pp.size == 1:
        return 0
    return micro_batches * (2 * len(share.chunks) - share.is_last - share.is_first) * stream_bytes(share)


def keys_bytes(share: Share) -> int:
    """Keys and values of the rows of cut sequences, one layer and micro-batch: e x 2 K Dh x rows x (cp - 1)."""
    return gather_bytes(share.rows.sent * 2 * share.K * share.Dh * share.e, share.mesh.cp.size)


def keys_gradient_bytes(share: Share) -> int:
    """Gradients of others' keys and values, back to them: e x 2 K Dh for each row received and each lane."""
    return share.context_lanes * share.rows.received * 2 * share.K * share.Dh * share.e


def results_bytes(share: Share) -> int:
    """Log-probability and entropy of each token to the other context-parallel ranks: 8 T (cp - 1) on the last stage."""
    return gather_bytes(2 * FP32 * share.T, share.mesh.cp.size) if share.is_last else 0


def shared_gradient_bytes(share: Share) -> int:
    """Gradients of rows that several tensor-parallel ranks hold, each with its part, to all of them: 4 bytes (p - 1) x
    the elements of replicated keys and values, of q/k norms, and under sequence parallelism of every norm and of the
    biases behind a row-parallel matmul."""
    model, row, num_layers = share.model, architecture_of(share.model), share.num_layers
    elements = 0
    if share.heads.replicas > 1:
        elements += num_layers * 2 * share.K * share.Dh * (share.D + row.has_qkv_bias(model))
    if row.qk_norm:
        elements += num_layers * 2 * share.Dh
    if share.placement.sequence_parallel:
        vectors = 2 + row.has_out_bias(model) + row.has_mlp_bias(model)
        elements += (num_layers * vectors + share.is_last) * share.D
    return gather_bytes(FP32 * elements, share.mesh.tp.size)


def gradient_reduce_bytes(share: Share) -> int:
    """One lane's gradients to the ranks that step their rows: 4 bytes x (elements - this rank's), for each context lane
    of it."""
    if optimizer.adds_in_place(share):
        return 0
    return FP32 * share.context_lanes * (num_gradients(share) - optimizer.summed_elements(share))


def weight_gather_bytes(share: Share) -> int:
    """The updated compute weights of this rank's rows to the others: their bytes x (dp cp - 1)."""
    return gather_bytes(optimizer.owned(share).weight_bytes, share.mesh.data.size)


def tied_gradient_bytes(share: Share) -> int:
    """The gradient of a tied embedding's rows between the first stage and the last: 4 bytes x this rank's of them."""
    return FP32 * optimizer.owned(share).tied_elements if share.mesh.pp.size > 1 else 0


def lanes_of_rank(share: Share) -> int:
    """Lanes that the busiest replica runs one after the other: ceil(lanes / dp)."""
    return -(-optimizer.num_lanes(share) // share.mesh.dp.size)


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends to its peers of one axis of the mesh in a step."""

    kind: str
    axis: str
    num_bytes: int


def step_traffic(share: Share, micro_batches: int) -> list[Traffic]:
    """All that a rank sends in a step of M micro-batches and one optimizer step, kind by kind; what is 0 is left out.

    With activation checkpointing the layers' forward traffic is sent twice.
    """
    num_layers, lanes = share.num_layers, lanes_of_rank(share)
    forwards = 1 + share.config.activation_checkpointing
    forward = forwards * num_layers * layer_forward_bytes(share) + ends_forward_bytes(share)
    backward = num_layers * (layer_column_backward_bytes(share) + layer_row_backward_bytes(share))
    backward += ends_backward_bytes(share)
    keys = forwards * num_layers * keys_bytes(share) + results_bytes(share)
    found = [
        Traffic("forward: rows and partial sums", "tp", micro_batches * forward),
        Traffic("backward: rows and partial sums", "tp", micro_batches * backward),
        Traffic(
            "gradients of shared rows",
            "tp",
            (1 if optimizer.adds_in_place(share) else lanes * share.context_lanes) * shared_gradient_bytes(share),
        ),
        Traffic("keys, values and results", "cp", micro_batches * keys),
        Traffic("gradients of keys and values", "cp", micro_batches * num_layers * keys_gradient_bytes(share)),
        Traffic("streams and their gradients", "pp", pipeline_bytes(share, micro_batches)),
        Traffic("gradients to their owners", "data", lanes * gradient_reduce_bytes(share)),
        Traffic("the tied embedding's gradient", "pp", tied_gradient_bytes(share)),
        Traffic("updated weights", "data", weight_gather_bytes(share)),
    ]
    return [traffic for traffic in found if traffic.num_bytes]
