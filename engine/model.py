"""The only forward: prefill, decode, scoring and training call it on packed tokens.

# T tokens, D model width, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from engine.architectures import architecture_of
from engine.batch import TokenBatch
from engine.config import ModelConfig
from engine.kernels.dtypes import wide_dtype
from engine.kernels.graph import empty, host_call
from engine.kernels.memory import unowned
from engine.kernels.op import OPS
from engine.kernels.rms_norm import add_rms_norm
from engine.kernels.rope import rope_table
from engine.kernels.weight import Weight
from engine.layers import Layer, matrix, vector
from engine.parallel.data import tell_backward
from engine.parallel.shards import Placement, layer_chunks, row_shard
from engine.parallel.tensor import all_rows, vocabulary_embedding
from engine.parallel.vocabulary import vocabulary_logprob
from engine.parts import (
    EMBEDDING,
    HEAD,
    NORM,
    Part,
    PartialGradient,
    layer_parts,
    replicated,
    tensor_shapes,
    vocabulary_rows,
)

HEAD_BUCKET = 0  # see `Transformer.gradient_buckets`


@dataclass(frozen=True)
class Chunk:
    """Neighbouring layers that run on this rank in one go: a virtual stage of the pipeline."""

    layers: list[Layer]
    first: bool  # it begins with the embedding
    last: bool  # it ends with the last norm


class Transformer:
    """A decoder-only transformer, or the part of it that a rank holds, on the device that is torch's default while it
    is made (`with torch.device(...)`). Weights are made uninitialised: `initialize` or a checkpoint fills them."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        placement: Placement | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """`kv_dtype`: see `AttentionSpec`."""
        self.placement = placement = placement or Placement()
        mesh = placement.mesh
        row = architecture_of(config)
        positions = config.max_position_embeddings
        self.device = torch.get_default_device()
        with torch.device("meta" if self.device.type == "meta" else "cpu"):  # the same bits on every real device
            rope = rope_table(config.head_dim, config.rope_theta, config.rope_scaling, positions, wide_dtype(dtype))
        rope = rope.to(self.device)
        self.config = config
        self.dtype = dtype
        self.mesh = mesh
        self.checkpointing = False  # recompute each layer in the backward instead of keeping its activations
        self.backward_passed: Callable[[int], None] | None = None  # called with the number of a gradient bucket
        ranges = layer_chunks(config.num_hidden_layers, mesh.pp.size, placement.chunks_per_stage, mesh.pp.index)
        self.layers: list[Layer] = []
        self.chunks: list[Chunk] = []
        for number, layers in enumerate(ranges):
            here = [
                Layer(index, len(self.layers) + place, config, row, rope, dtype, mesh, kv_dtype)
                for place, index in enumerate(layers)
            ]
            self.layers += here
            first = number == 0 and mesh.pp.index == 0
            last = number == len(ranges) - 1 and mesh.pp.index == mesh.pp.size - 1
            self.chunks.append(Chunk(here, first, last))
        self.vocabulary = row_shard(config.vocab_size, mesh.tp.size, mesh.tp.index)
        rows, width, tied = self.vocabulary.size, config.hidden_size, config.tie_word_embeddings
        if self.has_first:
            self.embed = Weight(EMBEDDING, (rows, width), dtype, packed=tied)
        if self.has_last:
            self.norm = vector(NORM, width, dtype)
            # A tied head beside the embedding is its storage, with a gradient of its own: see `tied_weights`.
            self.head = self.embed.slice(0, rows) if tied and self.has_first else matrix(HEAD, rows, width, dtype)

    @property
    def has_first(self) -> bool:
        """Whether the embedding is on this rank."""
        return self.chunks[0].first

    @property
    def has_last(self) -> bool:
        """Whether the last norm and the head are on this rank."""
        return self.chunks[-1].last

    @property
    def recordable(self) -> bool:
        """Whether a graph can record the forward: C++ kernels run all of its ops on a CPU, or kernels on a GPU do."""
        attention = "attention" if self.layers[0].attention.spec.kv_dtype is None else "attention_e4m3"
        ops = ("embedding", "rms_norm", "linear", attention, "swiglu")
        serving = {OPS[name].chosen(self.dtype, self.device.type).name for name in ops}
        return serving == {"cpu"} if self.device.type == "cpu" else "torch" not in serving

    def forward(self, batch: TokenBatch, stream: Tensor | None = None, chunk: int = 0) -> Tensor:
        """Hidden states after the last norm, [T, D], all rows on every tensor-parallel rank.

        A chunk of a pipeline takes the residual stream of the chunk before it (the first takes none) and returns its
        own, [T, D], or this rank's share of the rows where the batch is scattered.
        """
        here = self.chunks[chunk]
        x, delta = self.start(here, batch, stream), None
        for layer in here.layers:
            x, delta = self.run(layer.place, partial(layer, batch=batch), x, delta)
        return self.end(here, batch, x, delta)

    def start(self, here: Chunk, batch: TokenBatch, stream: Tensor | None) -> Tensor:
        """The residual stream that a chunk begins with: the embedding [T] -> [T, D], or what the chunk before it
        ended with."""
        if here.first:
            group, rows = self.mesh.tp, batch.scattered_rows
            return vocabulary_embedding(batch.tokens, self.embed, self.vocabulary.first, group, rows)
        assert stream is not None, "a chunk after the first takes the stream of the one before it"
        return stream

    def run(self, place: int, layer: Callable[..., Any], *streams: Tensor | None) -> Any:
        """What the layer of that place makes of residual streams: its activations are kept, or computed again in the
        backward, which says when it is through with the layer."""
        told = self.told(self.has_last + len(self.layers) - 1 - place, *streams)
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *told, use_reentrant=False, preserve_rng_state=False)
        return layer(*told)

    def end(self, here: Chunk, batch: TokenBatch, x: Tensor, delta: Tensor | None) -> Tensor:
        """What a chunk hands on: the hidden states after the last norm, or the stream for the chunk after it."""
        assert delta is not None, "a chunk has at least one layer"
        if not here.last:
            return _sum(x, delta)
        normed = add_rms_norm(x, delta, self.norm, self.config.rms_norm_eps)[1]
        return all_rows(normed, self.mesh.tp, batch.scattered_rows)  # [T, D]

    def stream_shape(self, batch: TokenBatch) -> tuple[int, int]:
        """What passes from chunk to chunk: all rows, or this rank's share of them, [T or S, D]."""
        rows = batch.num_tokens if batch.scattered_rows is None else -(-batch.scattered_rows // self.mesh.tp.size)
        return rows, self.config.hidden_size

    def token_logprob(
        self, hidden: Tensor, targets: Tensor, inv_temperature: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of each target and entropy of its distribution: [N, D], int32 [N] -> [N], [N]; the same on
        every tensor-parallel rank. See `kernels.token_logprob`."""
        (hidden,) = self.told(HEAD_BUCKET, hidden)
        return vocabulary_logprob(hidden, self.head, targets, inv_temperature, self.vocabulary.first, self.mesh.tp)

    def told(self, bucket: int, *tensors: Any) -> Any:
        """The tensors, with a note in the graph: a backward that has come back to them is through with the bucket."""
        if self.backward_passed is None or not torch.is_grad_enabled():
            return tensors
        return tell_backward(partial(self.backward_passed, bucket), *tensors)

    def parts(self) -> list[Part]:
        """Every tensor of the checkpoint that this rank holds a region of, in the checkpoint's order."""
        return list(self._parts())

    def weights(self) -> list[Weight]:
        """Each weight of this rank once, in a fixed order; a head that shares the embedding's storage is none."""
        return list({id(part.weight): part.weight for part in self.parts()}.values())

    def gradient_buckets(self) -> list[list[Weight]]:
        """The weights that have gradients, in the order in which a backward is through with them: the head, layers
        from the last one (with the last norm) to the first, the embedding. `backward_passed` counts in this order."""
        buckets = [[self.head]] if self.has_last else []
        for layer in reversed(self.layers):
            parts = layer_parts(layer, self.config, first=True)
            buckets.append(list({id(part.weight): part.weight for part in parts}.values()))
        if self.has_last:
            buckets[1].append(self.norm)
        if self.has_first:
            buckets.append([self.embed])
        return buckets

    @property
    def tied_weights(self) -> list[Weight]:
        """The embedding and the head of a model that ties them, as far as they are on this stage. On one stage they
        share their storage, on two they are copies. Either way their gradients are summed apart and added up when all
        micro-batches are through, so that the bits do not depend on where the two are."""
        if not self.config.tie_word_embeddings:
            return []
        return ([self.embed] if self.has_first else []) + ([self.head] if self.has_last else [])

    def partial_gradients(self) -> list[PartialGradient]:
        """What is left to be summed over tensor-parallel ranks when a backward is through, in a fixed order."""
        tp = self.mesh.tp
        if tp.size == 1:
            return []
        found: list[PartialGradient] = []
        everyone = range(tp.size)
        scattered = self.placement.sequence_parallel
        for layer in self.layers:
            at = layer.attention
            if at.shard.replicas > 1:
                begin = at.shard.heads.size * self.config.head_dim
                first = tp.index // at.shard.replicas * at.shard.replicas
                holders = range(first, first + at.shard.replicas)
                fused = (weight for weight in (at.qkv.weight, at.qkv.bias) if weight)
                found += [PartialGradient(weight, begin, weight.shape[0] - begin, holders) for weight in fused]
            shared = [at.q_norm, at.k_norm]
            if scattered:
                shared += [layer.input_norm, layer.post_norm, at.out.bias, layer.feed_forward.down.bias]
            found += [PartialGradient(weight, 0, weight.shape[0], everyone) for weight in shared if weight]
        if scattered and self.has_last:
            found.append(PartialGradient(self.norm, 0, self.norm.shape[0], everyone))
        return found

    def initialize(self, seed: int) -> None:
        """Random weights: normal with `initializer_range`, norms 1, biases 0; a function of (seed, tensor) alone, so
        that every rank of any mesh begins with its regions of the same model."""
        numbers = {name: number for number, name in enumerate(tensor_shapes(self.config))}
        for part in self.parts():
            if part.name.endswith("bias"):
                value = torch.zeros(part.shape)
            elif len(part.shape) == 1:
                value = torch.ones(part.shape)
            else:
                generator = torch.Generator().manual_seed(seed * 1_000_003 + numbers[part.name])
                value = torch.randn(part.whole, generator=generator).mul_(self.config.initializer_range)
                value = value[part.region]
            part.weight.load_(value, row=part.row)

    def nbytes(self) -> int:
        """Bytes of all compute weights of this rank."""
        return sum(weight.nbytes for weight in self.weights())

    def _parts(self) -> Iterator[Part]:
        vocabulary, size, first = self.vocabulary, self.config.vocab_size, self.mesh.tp.index == 0
        if self.has_first:
            yield vocabulary_rows(self.embed, EMBEDDING, vocabulary, size)
        for layer in sorted(self.layers, key=lambda layer: layer.index):
            yield from layer_parts(layer, self.config, first)
        if self.has_last:
            yield replicated(self.norm, first)
            tied = self.config.tie_word_embeddings  # then it is the embedding, or a copy that the first stage owns
            if not (self.has_first and tied):
                yield vocabulary_rows(self.head, EMBEDDING if tied else HEAD, vocabulary, size, owned=not tied)


def _sum(x: Tensor, delta: Tensor) -> Tensor:
    """x + delta, the bits that the fused addition of the next layer would have made; a recorded forward adds at
    replay."""
    if x.requires_grad or delta.requires_grad:
        return x + delta
    out = empty(tuple(x.shape), x.dtype, x.device)
    left, right, target = unowned(x), unowned(delta), unowned(out)
    host_call(lambda rows: torch.add(left[:rows], right[:rows], out=target[:rows]), x.shape[0])
    return out
