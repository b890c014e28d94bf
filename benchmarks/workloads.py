"""The models and workloads that engines are compared on: token ids from fixed seeds, the same for every engine, and the
least work that each workload needs.

    W1   one prompt of 32, 128 greedy tokens: the speed of decoding alone
    W2   16 prompts of 128, 8 samples each, 128 tokens: a reinforcement-learning rollout (W2s: 4 prompts, 32 tokens)
    W3   4 prompts of 1024, 8 samples each, 32 tokens: long shared prompts
    W4   64 prompts of 16 to 512, one sample each, 8 to 256 tokens: ragged
    T1   training on 8 sequences of 512 (T1s: 2)
    TR   training on 64 sequences of 16 to 512
    R1   a whole GRPO step: 4 prompts of 64, 8 samples each, 128 tokens, then the gradient
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from engine.config import ModelConfig

FIRST_TOKEN = 16  # smaller ids are special tokens in the checkpoints that are compared: no prompt holds one

_LLAMA: dict[str, Any] = {
    "architecture": "LlamaForCausalLM",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "max_position_embeddings": 131072,
}

MODELS = {
    "llama-15m": ModelConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, tie_word_embeddings=True, **_LLAMA),
    "llama-110m": ModelConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=4, head_dim=64, tie_word_embeddings=False, **_LLAMA),
    "qwen3-0.6b": ModelConfig(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, architecture="Qwen3ForCausalLM",
        rms_norm_eps=1e-6, rope_theta=1000000.0, max_position_embeddings=131072),
    "llama-8b": ModelConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=False, **_LLAMA),
    "tiny": ModelConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, **_LLAMA),
}  # fmt: skip


@dataclass(frozen=True)
class Generation:
    """Prompts of token ids, each sampled `n` times for exactly `max_new[i]` tokens."""

    name: str
    prompts: list[list[int]]
    n: int
    max_new: list[int]
    temperature: float

    @property
    def output_tokens(self) -> int:
        return self.n * sum(self.max_new)

    @property
    def kv_tokens(self) -> int:
        """The most tokens that can be alive at once, a prompt counted once for its samples."""
        return sum(len(p) + self.n * m for p, m in zip(self.prompts, self.max_new, strict=True))

    def head(self, prompts: int, max_new: int) -> Generation:
        """The first few prompts for a few tokens: a warm-up."""
        few = self.prompts[:prompts]
        return Generation(self.name, few, self.n, [max_new] * len(few), self.temperature)


def generation(name: str, model: ModelConfig, scale: float = 1.0) -> Generation:
    """The workload called `name`, every length multiplied by `scale`. Raises KeyError for an unknown name."""
    rng = random.Random(f"peers-{name}")

    def ids(count: int) -> list[int]:
        return [rng.randrange(FIRST_TOKEN, model.vocab_size) for _ in range(count)]

    def short(count: int) -> int:
        return max(2, round(count * scale))

    if name == "W4":  # all prompts are drawn before all lengths
        prompts = [ids(short(rng.randint(16, 512))) for _ in range(64)]
        return Generation(name, prompts, 1, [short(rng.randint(8, 256)) for _ in range(64)], 1.0)
    num_prompts, prompt, n, new, temperature = {
        "W1": (1, 32, 1, 128, 0.0),
        "W2": (16, 128, 8, 128, 1.0),
        "W2s": (4, 128, 8, 32, 1.0),
        "W3": (4, 1024, 8, 32, 1.0),
        "R1": (4, 64, 8, 128, 1.0),
    }[name]
    prompts = [ids(short(prompt)) for _ in range(num_prompts)]
    return Generation(name, prompts, n, [short(new)] * num_prompts, temperature)


def training_lengths(name: str, scale: float = 1.0) -> list[int]:
    """Lengths of the sequences of T1, T1s or TR. Raises KeyError for an unknown name."""
    rng = random.Random("peers-T-ragged")
    lengths = {"T1": [512] * 8, "T1s": [512] * 2, "TR": [rng.randint(16, 512) for _ in range(64)]}[name]
    return [max(2, round(length * scale)) for length in lengths]


def training_sequences(name: str, model: ModelConfig, scale: float = 1.0) -> list[list[int]]:
    """Random token ids of those lengths."""
    rng = random.Random(f"sequences-{name}")
    return [
        [rng.randrange(FIRST_TOKEN, model.vocab_size) for _ in range(length)]
        for length in training_lengths(name, scale)
    ]


@dataclass(frozen=True)
class Size:
    """Multiply-adds per token: in the layers' matrices, in the head, and per key attended to."""

    layers: int
    head: int
    attention: int

    @property
    def weights(self) -> int:
        """Weights that every generated token multiplies by."""
        return self.layers + self.head


def size(model: ModelConfig) -> Size:
    query = model.num_attention_heads * model.head_dim
    key_value = model.num_key_value_heads * model.head_dim
    layer = model.hidden_size * (2 * query + 2 * key_value + 3 * model.intermediate_size)
    return Size(
        layers=model.num_hidden_layers * layer,
        head=model.hidden_size * model.vocab_size,
        attention=model.num_hidden_layers * 2 * query,
    )


def generation_flops(model: ModelConfig, work: Generation) -> int:
    """The least work that gives these tokens: each prompt computed once for all its samples, logits only where a token
    is sampled, nothing padded, the last token never fed back."""
    s = size(model)
    total = 0
    for prompt, new in zip(work.prompts, work.max_new, strict=True):
        length, fed = len(prompt), new - 1
        prefill = s.layers * length + s.attention * length * (length + 1) // 2
        keys = sum(length + i + 1 for i in range(fed))
        decode = s.layers * fed + s.attention * keys + s.head * new
        total += 2 * (prefill + work.n * decode)
    return total


def training_flops(model: ModelConfig, lengths: list[int]) -> int:
    """Forward and backward (twice the forward) over causal sequences, nothing recomputed or padded."""
    s = size(model)
    return 3 * sum(2 * (s.weights * n + s.attention * n * (n + 1) // 2) for n in lengths)


def grpo_flops(model: ModelConfig, work: Generation) -> int:
    """A rollout and the gradient over its sequences."""
    lengths = [len(p) + m for p, m in zip(work.prompts, work.max_new, strict=True) for _ in range(work.n)]
    return generation_flops(model, work) + training_flops(model, lengths)
