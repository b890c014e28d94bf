"""The only forward: prefill, decode, scoring and training call it on packed tokens.

# T tokens, D model width, V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from engine.architectures import architecture_of
from engine.batch import TokenBatch
from engine.config import ModelConfig
from engine.kernels.embedding import embedding
from engine.kernels.rms_norm import add_rms_norm
from engine.kernels.rope import rope_table
from engine.kernels.weight import Weight
from engine.layers import Layer, Linear, matrix, vector


@dataclass(frozen=True)
class Part:
    """One tensor of a Hugging Face checkpoint and the rows of ours that it fills."""

    name: str
    weight: Weight
    row: int
    shape: tuple[int, ...]


class Transformer:
    """A decoder-only transformer. Weights are made uninitialised: `initialize` or a checkpoint fills them."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        row = architecture_of(config)
        rope = rope_table(config.head_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings)
        self.config = config
        self.dtype = dtype
        self.checkpointing = False  # recompute each layer in the backward instead of keeping its activations
        self.embed = Weight(
            "model.embed_tokens.weight",
            (config.vocab_size, config.hidden_size),
            dtype,
            packed=config.tie_word_embeddings,
        )
        self.layers = [Layer(i, config, row, rope, dtype) for i in range(config.num_hidden_layers)]
        self.norm = vector("model.norm.weight", config.hidden_size, dtype)
        self.head = (
            self.embed
            if config.tie_word_embeddings
            else matrix("lm_head.weight", config.vocab_size, config.hidden_size, dtype)
        )

    def forward(self, batch: TokenBatch) -> Tensor:
        """Hidden states after the last norm, [T, D]; `head` turns rows of them into logits."""
        x, delta = self._run(self.layers[0], embedding(batch.tokens, self.embed), None, batch)  # [T] -> [T, D]
        for layer in self.layers[1:]:
            x, delta = self._run(layer, x, delta, batch)
        return add_rms_norm(x, delta, self.norm, self.config.rms_norm_eps)[1]  # [T, D]

    def _run(self, layer: Layer, x: Tensor, delta: Tensor | None, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, x, delta, batch, use_reentrant=False, preserve_rng_state=False)
        return layer(x, delta, batch)

    def parts(self) -> list[Part]:
        """Every tensor of the checkpoint, in its order, with the rows of ours that it fills."""
        return list(self._parts())

    def weights(self) -> list[Weight]:
        """Each weight once, in a fixed order."""
        return list({id(part.weight): part.weight for part in self.parts()}.values())

    def initialize(self, seed: int) -> None:
        """Random weights: normal with `initializer_range`, norms 1, biases 0; a function of (seed, tensor) alone."""
        for index, part in enumerate(self.parts()):
            if part.name.endswith("bias"):
                value = torch.zeros(part.shape)
            elif len(part.shape) == 1:
                value = torch.ones(part.shape)
            else:
                generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
                value = torch.randn(part.shape, generator=generator).mul_(self.config.initializer_range)
            part.weight.load_(value, row=part.row)

    def nbytes(self) -> int:
        """Bytes of all compute weights."""
        return sum(weight.nbytes for weight in self.weights())

    def _parts(self) -> Iterator[Part]:
        c = self.config
        q_rows, kv_rows = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        yield _whole(self.embed)
        for layer in self.layers:
            at, ff = layer.attention, layer.feed_forward
            yield from _rows(at.qkv, {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows})
            yield from _rows(at.out, {"o_proj": c.hidden_size})
            yield from (_whole(norm) for norm in (at.q_norm, at.k_norm) if norm)
            yield from _rows(ff.gate_up, {"gate_proj": c.intermediate_size, "up_proj": c.intermediate_size})
            yield from _rows(ff.down, {"down_proj": c.hidden_size})
            yield _whole(layer.input_norm)
            yield _whole(layer.post_norm)
        yield _whole(self.norm)
        if self.head is not self.embed:
            yield _whole(self.head)


def _whole(weight: Weight) -> Part:
    return Part(weight.name, weight, 0, weight.shape)


def _rows(module: Linear, pieces: dict[str, int]) -> Iterator[Part]:
    """The pieces a fused matrix (and its bias) is made of: name -> rows, in order."""
    for weight in (module.weight, module.bias):
        if weight is None:
            continue
        path, kind = weight.name.rsplit(".", 1)
        parent = path.rsplit(".", 1)[0]
        row = 0
        for piece, rows in pieces.items():
            yield Part(f"{parent}.{piece}.{kind}", weight, row, (rows, *weight.shape[1:]))
            row += rows
