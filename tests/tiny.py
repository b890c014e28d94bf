"""Small models and a small tokenizer for tests: every family, random weights, a few thousand parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engine.config import ModelConfig

VOCAB_SIZE = 304  # 256 bytes, the special tokens, and merges for the rest
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
EOS_TOKEN = "<|im_end|>"
PAD_TOKEN = "<|endoftext|>"

FAMILIES = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "MistralForCausalLM",
    "SeedOssForCausalLM",
)
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_config(architecture: str = "LlamaForCausalLM", **overrides: Any) -> ModelConfig:
    """Two layers of width 64; each family with what sets it apart (llama3 scaling, a window, a free head_dim)."""
    sizes = dict(_SIZES)
    if architecture == "LlamaForCausalLM":
        sizes["rope_scaling"] = dict(LLAMA3_SCALING)
    if architecture == "MistralForCausalLM":
        sizes["sliding_window"] = 20
    if architecture in ("Qwen3ForCausalLM", "SeedOssForCausalLM"):
        sizes["head_dim"] = 32  # wider than hidden_size / num_attention_heads
    return ModelConfig(architecture=architecture, **{**sizes, **overrides})


def save_hf_tiny(
    directory: str | Path,
    architecture: str = "LlamaForCausalLM",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Any:
    """A transformers model with random weights, saved to `directory` by transformers itself; returns the model.

    `overrides` are keys of the transformers configuration. Norm weights and biases are random too: ones and zeros
    would hide a norm or a bias that is left out.
    """
    import transformers

    extra: dict[str, Any] = {}
    if architecture == "LlamaForCausalLM":
        extra["rope_parameters"] = {**LLAMA3_SCALING, "rope_theta": 10000.0}
    if architecture == "MistralForCausalLM":
        extra["sliding_window"] = 20
    if architecture in ("Qwen3ForCausalLM", "SeedOssForCausalLM"):
        extra["head_dim"] = 32
    kind = getattr(transformers, architecture)
    config = kind.config_class(**{**_SIZES, **extra, **overrides}, attn_implementation="eager")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn_like(parameter) * 0.1
                parameter.copy_(noise + 1 if name.endswith("norm.weight") else noise)
    model = model.to(dtype)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model


def save_tiny_tokenizer(directory: str | Path, chat_template: str | None = None) -> None:
    """A byte-level BPE tokenizer of exactly VOCAB_SIZE tokens: tokenizer.json and tokenizer_config.json."""
    import json

    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=token.startswith("<|")) for token in SPECIAL_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = ["the staff and the two snakes", "think of the sum and then answer", "12 + 34 = 46, 56 + 78 = 134"] * 4
    tokenizer.train_from_iterator(corpus, trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": EOS_TOKEN,
        "pad_token": PAD_TOKEN,
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
