"""The parts of a decoder layer, or of one tensor-parallel rank's share of it. Each holds its weights and is called on
packed rows.

# T tokens, D model width, H query heads, K key/value heads, Dh head width, I feed-forward width; H, K and I are this
# rank's; under sequence parallelism the rows between matmuls are its share of the T
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.architectures import Architecture
from engine.batch import TokenBatch
from engine.config import ModelConfig
from engine.kernels.attention import AttentionSpec, attention
from engine.kernels.rms_norm import add_rms_norm
from engine.kernels.swiglu import swiglu
from engine.kernels.weight import Weight
from engine.parallel.context import share_keys
from engine.parallel.mesh import Mesh
from engine.parallel.shards import head_shard, row_shard
from engine.parallel.tensor import column_linear, row_linear


def matrix(name: str, rows: int, columns: int, dtype: torch.dtype) -> Weight:
    """A matrix that a matmul reads, [rows, columns]."""
    return Weight(name, (rows, columns), dtype, packed=True)


def vector(name: str, size: int, dtype: torch.dtype) -> Weight:
    """A norm's weight or a bias, [size]: never decayed."""
    return Weight(name, (size,), dtype, packed=False, decay=False)


class Linear:
    """The weights of y = x W^T + b."""

    def __init__(self, name: str, rows: int, columns: int, bias: bool, dtype: torch.dtype, mesh: Mesh) -> None:
        self.weight = matrix(f"{name}.weight", rows, columns, dtype)
        self.bias = vector(f"{name}.bias", rows, dtype) if bias else None
        self.tp = mesh.tp


class ColumnLinear(Linear):
    """Its rows of W are this rank's: the output's columns are dealt over tensor-parallel ranks."""

    def __call__(self, x: Tensor, batch: TokenBatch) -> Tensor:
        return column_linear(x, self.weight, self.bias, self.tp, batch.scattered_rows)


class RowLinear(Linear):
    """Its columns of W are this rank's: the input's columns are dealt, and the output is summed over ranks."""

    def __call__(self, x: Tensor, batch: TokenBatch) -> Tensor:
        return row_linear(x, self.weight, self.bias, self.tp, batch.scattered_rows)


class Attention:
    """Grouped-query attention (arXiv 2305.13245) with rotary positions; one fused matrix for q, k and v."""

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        row: Architecture,
        rope: Tensor,
        dtype: torch.dtype,
        mesh: Mesh,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.shard = head_shard(config, mesh.tp.size, mesh.tp.index)
        heads, kv_heads, width = self.shard.heads.size, self.shard.kv_heads.size, config.head_dim
        window, eps = row.window(config), config.rms_norm_eps
        self.spec = AttentionSpec(heads, kv_heads, width, window=window, eps=eps, kv_dtype=kv_dtype)
        self.rope = rope
        columns = (heads + 2 * kv_heads) * width
        self.qkv = ColumnLinear(f"{name}.qkv_proj", columns, config.hidden_size, row.has_qkv_bias(config), dtype, mesh)
        self.out = RowLinear(f"{name}.o_proj", config.hidden_size, heads * width, row.has_out_bias(config), dtype, mesh)
        self.q_norm = vector(f"{name}.q_norm.weight", width, dtype) if row.qk_norm else None
        self.k_norm = vector(f"{name}.k_norm.weight", width, dtype) if row.qk_norm else None

    def __call__(self, qkv: Tensor, kv: Tensor | None, batch: TokenBatch, index: int) -> Tensor:
        """[T, (H + 2 K) Dh], or [T, H Dh] with the keys and values [T_kv, 2 K Dh] of all rows -> [T, D]."""
        keys, values = (batch.kv.keys[index], batch.kv.values[index]) if batch.kv else (None, None)
        mixed = attention(qkv, self.spec, self.rope, batch.plan, keys, values, self.q_norm, self.k_norm, kv)
        return self.out(mixed, batch)  # [T, H Dh] -> [T, D]


class FeedForward:
    """SwiGLU (arXiv 2002.05202); one fused matrix for gate and up."""

    def __init__(self, name: str, config: ModelConfig, row: Architecture, dtype: torch.dtype, mesh: Mesh) -> None:
        bias = row.has_mlp_bias(config)
        self.shard = row_shard(config.intermediate_size, mesh.tp.size, mesh.tp.index)
        inner, width = self.shard.size, config.hidden_size
        self.gate_up = ColumnLinear(f"{name}.gate_up_proj", 2 * inner, width, bias, dtype, mesh)
        self.down = RowLinear(f"{name}.down_proj", width, inner, bias, dtype, mesh)

    def __call__(self, x: Tensor, batch: TokenBatch) -> Tensor:
        return self.down(swiglu(self.gate_up(x, batch)), batch)  # [T, D] -> [T, 2 I] -> [T, I] -> [T, D]


class Layer:
    """One decoder layer. The residual stream x and what is still to be added to it travel apart, so that each addition
    is one kernel with the norm that follows it. `place` is its number among the layers of this rank."""

    def __init__(
        self,
        index: int,
        place: int,
        config: ModelConfig,
        row: Architecture,
        rope: Tensor,
        dtype: torch.dtype,
        mesh: Mesh,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        name = f"model.layers.{index}"
        self.index = index
        self.place = place
        self.eps = config.rms_norm_eps
        self.input_norm = vector(f"{name}.input_layernorm.weight", config.hidden_size, dtype)
        self.attention = Attention(f"{name}.self_attn", config, row, rope, dtype, mesh, kv_dtype)
        self.post_norm = vector(f"{name}.post_attention_layernorm.weight", config.hidden_size, dtype)
        self.feed_forward = FeedForward(f"{name}.mlp", config, row, dtype, mesh)

    def __call__(self, x: Tensor, delta: Tensor | None, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """x and what is still to be added to it (a first layer's None) -> the same after this layer, each [T, D]."""
        x, qkv = self.start(x, delta, batch)
        kv = None
        if batch.context is not None:
            (qkv,), (kv,) = share_keys([qkv], self.attention.spec, batch.context)  # -> [T, H Dh], [T_kv, 2 K Dh]
        return self.end(x, self.attention(qkv, kv, batch, self.place), batch)

    def start(self, x: Tensor, delta: Tensor | None, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """x + delta [T, D], and what attention takes, [T, (H + 2 K) Dh]."""
        x, h = add_rms_norm(x, delta, self.input_norm, self.eps)
        return x, self.attention.qkv(h, batch)

    def end(self, x: Tensor, h: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """x and what attention adds to it -> x and what the feed-forward part adds to it, each [T, D]."""
        x, h = add_rms_norm(x, h, self.post_norm, self.eps)
        return x, self.feed_forward(h, batch)
