"""How long a training step should take: FLOPs over the machine's figures, and what of the traffic nothing hides.

An estimate for comparing meshes, not a measurement: matmuls and attention are counted, everything else is in the
machine's achieved fraction; latencies, the optimizer's own arithmetic and uneven samples are left out.

# T tokens of a micro-batch on a rank, N x K a matmul's matrix, H query heads of a rank, Dh head width
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from engine.config import EngineConfig, ModelConfig, ParallelConfig
from engine.parallel.mesh import Mesh
from engine.parallel.schedule import Costs, schedule, simulate
from engine.parallel.shards import Placement
from engine.planner import traffic
from engine.planner.footprint import held_weights
from engine.planner.machine import Machine
from engine.planner.share import Share

SIMULATED = 2  # micro-batches per stage that are simulated, at least: from there on each adds no idle time


def keys_per_query(sequence_tokens: int, window: int | None) -> float:
    """Keys that a token of a causal sequence of s sees, on average: (s + 1) / 2; with a window w < s
    w - w (w - 1) / (2 s)."""
    if window is None or window >= sequence_tokens:
        return (sequence_tokens + 1) / 2
    return window - window * (window - 1) / (2 * sequence_tokens)


@dataclass(frozen=True)
class Flops:
    """FLOPs of one micro-batch in all chunks of a rank."""

    forward: float
    input_grad: float
    weight_grad: float

    @property
    def total(self) -> float:
        return self.forward + self.input_grad + self.weight_grad


def micro_batch_flops(share: Share) -> Flops:
    """Forward 2 N K T for each matrix that a matmul reads and 4 H Dh T keys for attention; gradients of inputs
    2 N K T and 10 H Dh T keys (scores again, then four products); of weights 2 N K T. The head's logits are computed a
    second time in its backward, and with activation checkpointing so is every layer's forward."""
    head = 2.0 * share.V * share.D * share.T if share.is_last else 0.0
    matrices = (w for w in held_weights(share) if w.packed and w.name not in ("embedding", "head"))
    layers = 2.0 * share.T * sum(matrix.num_elements for matrix in matrices)
    keys = keys_per_query(share.sequence_tokens, share.model.sliding_window)
    attention = 4.0 * share.H * share.Dh * share.T * keys * share.num_layers
    again = layers + attention if share.config.activation_checkpointing else 0.0
    return Flops(
        forward=layers + attention + head,
        input_grad=layers + 2.5 * attention + 2 * head + again,
        weight_grad=layers + head,
    )


def model_flops(model: ModelConfig, sequence_tokens: int) -> float:
    """FLOPs that a token needs, whoever computes them and nothing twice: 6 per parameter that a matmul reads and
    12 H Dh keys per layer. What a step achieves of the machine's peak (MFU, arXiv 2204.02311) is counted in these."""
    alone = Share(model, EngineConfig(), Placement(), sequence_tokens)
    matrices = sum(weight.num_elements for weight in held_weights(alone) if weight.packed)
    keys = keys_per_query(sequence_tokens, model.sliding_window)
    return 6.0 * matrices + 12.0 * alone.H * alone.Dh * keys * model.num_hidden_layers


def send_seconds(num_bytes: float, ranks: tuple[int, ...], index: int, machine: Machine) -> float:
    """Seconds for `num_bytes` in equal parts to all other `ranks`, those of one's own node and those of others at the
    same time, each at the machine's bandwidth: the longer of the two."""
    if not num_bytes:
        return 0.0
    node = ranks[index] // machine.ranks_per_node
    near = sum(rank // machine.ranks_per_node == node for rank in ranks) - 1
    far = len(ranks) - 1 - near
    each = num_bytes / (len(ranks) - 1)
    return each * max(
        near / (machine.intra_gbps * 1e9) if near else 0.0, far / (machine.inter_gbps * 1e9) if far else 0.0
    )


def missing_figures(machine: Machine, mesh: Mesh) -> list[str]:
    """The figures that a time for this mesh needs and the machine does not have."""
    nodes = {rank // machine.ranks_per_node for rank in mesh.world.ranks}
    wanted = ["peak_tflops"]
    if mesh.world.size > len(nodes):
        wanted.append("intra_gbps")
    if len(nodes) > 1:
        wanted.append("inter_gbps")
    return [figure for figure in wanted if not getattr(machine, figure)]


@dataclass(frozen=True)
class StageTime:
    """Seconds of one micro-batch on a rank of one stage, all its chunks; the exposed communication is in them."""

    forward: float
    input_grad: float
    weight_grad: float
    exposed: float

    @property
    def total(self) -> float:
        return self.forward + self.input_grad + self.weight_grad


def stage_time(share: Share, machine: Machine) -> StageTime:
    """Compute is FLOPs / (peak x achieved fraction). Tensor-parallel traffic of the forward stands in the way of the
    next matmul and is exposed, so is that of row-parallel backwards; that of column-parallel backwards only where it
    takes longer than the weight gradients that are computed meanwhile. Keys and values are exposed both ways."""
    mesh, flops, num_layers = share.mesh, micro_batch_flops(share), share.num_layers

    def tensor(num_bytes: float) -> float:
        return send_seconds(num_bytes, mesh.tp.ranks, mesh.tp.index, machine)

    def context(num_bytes: float) -> float:
        return send_seconds(num_bytes, mesh.cp.ranks, mesh.cp.index, machine)

    layers = tensor(num_layers * traffic.layer_forward_bytes(share)) + context(num_layers * traffic.keys_bytes(share))
    weight_grad = flops.weight_grad / machine.flops
    late = max(0.0, tensor(num_layers * traffic.layer_column_backward_bytes(share)) - weight_grad)
    forward = layers + tensor(traffic.ends_forward_bytes(share)) + context(traffic.results_bytes(share))
    backward = late + tensor(num_layers * traffic.layer_row_backward_bytes(share) + traffic.ends_backward_bytes(share))
    backward += context(num_layers * traffic.keys_gradient_bytes(share))
    backward += layers if share.config.activation_checkpointing else 0.0
    return StageTime(
        forward=flops.forward / machine.flops + forward,
        input_grad=flops.input_grad / machine.flops + backward,
        weight_grad=weight_grad,
        exposed=forward + backward,
    )


def counted_micro_batches(num_stages: int, micro_batches: int) -> int:
    """As many micro-batches as tell all about a schedule of M: M, or 2 P to 3 P - 1 with the same remainder by P."""
    return min(micro_batches, SIMULATED * num_stages + micro_batches % num_stages)


@lru_cache
def idle_time(parallel: ParallelConfig, costs: Costs, micro_batches: int) -> float:
    """How much longer the pipeline takes than M micro-batches on one of its ranks: the schedule's list is simulated for
    `counted_micro_batches`."""
    counted = counted_micro_batches(parallel.pp, micro_batches)
    plan = schedule(parallel.schedule, parallel.pp, counted, parallel.chunks_per_stage)
    return simulate(plan, costs).makespan - counted * (costs.forward + costs.input_grad + costs.weight_grad)


def bubble(parallel: ParallelConfig, costs: Costs, micro_batches: int) -> float:
    """The share of the pipeline's time that its ranks are idle: idle / (idle + M x the time of one)."""
    idle = idle_time(parallel, costs, micro_batches)
    return idle / (idle + micro_batches * (costs.forward + costs.input_grad + costs.weight_grad))


@dataclass(frozen=True)
class StepTime:
    """Seconds of one training step and where they go."""

    compute: float  # of the slowest stage's rank, without anything in the way
    exposed: float  # tensor- and context-parallel traffic that the slowest stage waits for
    bubble: float  # the pipeline's idle time
    gradients: float  # what the last backward does not hide of the gradients' way to their owners
    weights: float  # updated weights on their way back
    bubble_fraction: float

    @property
    def total(self) -> float:
        return self.compute + self.exposed + self.bubble + self.gradients + self.weights


def step_time(shares: list[Share], machine: Machine, micro_batches: int) -> StepTime:
    """One step of M micro-batches; `shares` are those of one rank of each stage.

    The pipeline's schedule is simulated with the slowest stage's times for all. Gradients travel while the last
    micro-batch's backward of a lane runs; what takes longer is exposed.
    """
    parallel = shares[0].config.parallel
    slowest = max((stage_time(share, machine) for share in shares), key=lambda time: time.total)
    ranks, stream = shares[0].mesh.pp.ranks, traffic.stream_bytes(shares[0])
    hop = max((send_seconds(stream, pair, 0, machine) for pair in pairwise(ranks)), default=0.0)
    costs = Costs(slowest.forward, slowest.input_grad, slowest.weight_grad, hop)
    backward = slowest.input_grad + slowest.weight_grad
    gradients = weights = 0.0
    for share in shares:
        link = (share.mesh.data.ranks, share.mesh.data.index, machine)
        lane = send_seconds(traffic.gradient_reduce_bytes(share), *link)
        gradients = max(gradients, traffic.lanes_of_rank(share) * (lane - backward))
        weights = max(weights, send_seconds(traffic.weight_gather_bytes(share), *link))
    return StepTime(
        compute=micro_batches * (slowest.total - slowest.exposed),
        exposed=micro_batches * slowest.exposed,
        bubble=idle_time(parallel, costs, micro_batches),
        gradients=gradients,
        weights=weights,
        bubble_fraction=bubble(parallel, costs, micro_batches),
    )
