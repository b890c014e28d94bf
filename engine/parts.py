"""The tensors of a Hugging Face checkpoint, and the region of each that a rank holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.architectures import architecture_of
from engine.config import ModelConfig
from engine.kernels.weight import Weight
from engine.layers import Layer, Linear
from engine.parallel.shards import Span

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Part:
    """One tensor of a checkpoint, the region of it that this rank holds, and the rows of ours that it fills.

    The region has `shape` and begins at `origin` of the tensor, whose shape is `whole`. `owned` is True on one of the
    ranks of a replica that hold the region.
    """

    name: str
    weight: Weight
    row: int
    shape: tuple[int, ...]
    origin: tuple[int, ...]
    whole: tuple[int, ...]
    owned: bool = True

    @property
    def region(self) -> tuple[slice, ...]:
        """The region as an index into the whole tensor."""
        return tuple(slice(first, first + size) for first, size in zip(self.origin, self.shape, strict=True))


@dataclass(frozen=True)
class PartialGradient:
    """Rows of a weight that the tensor-parallel ranks at places `holders` hold alike, each with its part of the
    gradient."""

    weight: Weight
    row: int
    rows: int
    holders: range


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the whole checkpoint, in its order: name -> shape."""
    c, row = config, architecture_of(config)
    q_rows, kv_rows = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    qkv = {"self_attn.q_proj": q_rows, "self_attn.k_proj": kv_rows, "self_attn.v_proj": kv_rows}
    gate_up = {"mlp.gate_proj": c.intermediate_size, "mlp.up_proj": c.intermediate_size}
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (c.vocab_size, c.hidden_size)}

    def add(at: str, pieces: dict[str, int], width: int, bias: bool) -> None:
        shapes.update({f"{at}.{name}.weight": (rows, width) for name, rows in pieces.items()})
        if bias:
            shapes.update({f"{at}.{name}.bias": (rows,) for name, rows in pieces.items()})

    for index in range(c.num_hidden_layers):
        at = f"model.layers.{index}"
        add(at, qkv, c.hidden_size, row.has_qkv_bias(c))
        add(at, {"self_attn.o_proj": c.hidden_size}, q_rows, row.has_out_bias(c))
        if row.qk_norm:
            shapes |= {f"{at}.self_attn.{name}.weight": (c.head_dim,) for name in ("q_norm", "k_norm")}
        add(at, gate_up, c.hidden_size, row.has_mlp_bias(c))
        add(at, {"mlp.down_proj": c.hidden_size}, c.intermediate_size, row.has_mlp_bias(c))
        shapes |= {f"{at}.{name}.weight": (c.hidden_size,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes[NORM] = (c.hidden_size,)
    if not c.tie_word_embeddings:
        shapes[HEAD] = (c.vocab_size, c.hidden_size)
    return shapes


def layer_parts(layer: Layer, config: ModelConfig, first: bool) -> Iterator[Part]:
    """The parts of one layer, in the checkpoint's order; `first`: this is the first tensor-parallel rank."""
    at, ff, width = layer.attention, layer.feed_forward, config.head_dim
    heads, kv_heads = _times(at.shard.heads, width), _times(at.shard.kv_heads, width)
    q_rows, kv_rows = config.num_attention_heads * width, config.num_key_value_heads * width
    qkv = {"q_proj": (heads, q_rows, True)}
    qkv |= {name: (kv_heads, kv_rows, at.shard.owned) for name in ("k_proj", "v_proj")}
    yield from _fused(at.qkv, qkv)
    yield from _columns(at.out, heads, q_rows, first)
    yield from (replicated(norm, first) for norm in (at.q_norm, at.k_norm) if norm)
    yield from _fused(
        ff.gate_up, {f"{name}_proj": (ff.shard, config.intermediate_size, True) for name in ("gate", "up")}
    )
    yield from _columns(ff.down, ff.shard, config.intermediate_size, first)
    yield replicated(layer.input_norm, first)
    yield replicated(layer.post_norm, first)


def replicated(weight: Weight, owned: bool) -> Part:
    """A vector that every rank holds whole."""
    return Part(weight.name, weight, 0, weight.shape, (0,), weight.shape, owned)


def vocabulary_rows(weight: Weight, name: str, span: Span, vocab_size: int, owned: bool = True) -> Part:
    """The rows of an embedding or head."""
    width = weight.shape[1]
    return Part(name, weight, 0, (span.size, width), (span.first, 0), (vocab_size, width), owned)


def _fused(module: Linear, pieces: dict[str, tuple[Span, int, bool]]) -> Iterator[Part]:
    """The pieces that a fused matrix (and its bias) is made of: name -> (rows held, all rows, owned), in order."""
    for weight in (module.weight, module.bias):
        if weight is None:
            continue
        path, kind = weight.name.rsplit(".", 1)
        parent = path.rsplit(".", 1)[0]
        row, rest = 0, weight.shape[1:]
        for piece, (span, rows, owned) in pieces.items():
            origin = (span.first, *(0 for _ in rest))
            yield Part(f"{parent}.{piece}.{kind}", weight, row, (span.size, *rest), origin, (rows, *rest), owned)
            row += span.size


def _columns(module: Linear, span: Span, columns: int, first: bool) -> Iterator[Part]:
    """A matrix of which this rank holds columns, and its bias, which every rank holds."""
    rows = module.weight.shape[0]
    yield Part(module.weight.name, module.weight, 0, (rows, span.size), (0, span.first), (rows, columns))
    if module.bias is not None:
        yield replicated(module.bias, first)


def _times(span: Span, factor: int) -> Span:
    return Span(span.first * factor, span.size * factor)
