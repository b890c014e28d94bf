"""A model to start from nothing: random weights, a tokenizer of characters made from the corpus, a chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from engine import Engine, EngineConfig, Mesh, ModelConfig, Tokenizer
from rl.config import NewModelConfig

END, PAD, UNKNOWN = "<|end|>", "<|pad|>", "<|unknown|>"
SPECIAL_TOKENS = (PAD, UNKNOWN, END, "<|user|>", "<|assistant|>", "<|system|>", "<|thinking|>")
THOUGHT_TOKENS = ("<think>", "</think>")  # one id each, but text like any other: a reader should see them

# ChatML's shape with tokens of one id each. Such a model has only ever seen one question at a time, so that is what it
# is shown: the conversation from the last user message on. <|thinking|> in front asks for a thought.
CHAT_TEMPLATE = """\
{%- set ns = namespace(start=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.start = loop.index0 %}{% endif %}{% endfor %}
{%- if thinking %}<|thinking|>{% endif %}
{%- for message in messages[ns.start:] %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""


def write_fresh_model(directory: Path, config: NewModelConfig, texts: Iterable[str], seed: int) -> None:
    """Writes a Hugging Face directory with random weights, a function of `seed`, and a tokenizer whose vocabulary is
    the characters of `texts` and of printable ASCII. What was in the directory is replaced. Of several ranks one calls
    it. Raises CheckpointError."""
    with TemporaryDirectory() as scratch:
        _write_tokenizer(Path(scratch), texts)
        tokenizer = Tokenizer.from_pretrained(scratch)
    model_config = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=tokenizer.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        initializer_range=config.initializer_range,
        tie_word_embeddings=config.tie_word_embeddings,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    fresh = Engine.from_config(model_config, EngineConfig(dtype="float32"), seed, tokenizer, Mesh.single())
    shutil.rmtree(directory, ignore_errors=True)
    fresh.save_pretrained(directory)


def _write_tokenizer(directory: Path, texts: Iterable[str]) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    ascii_characters = "".join(map(chr, range(32, 127)))
    trainer = trainers.WordLevelTrainer(special_tokens=list(SPECIAL_TOKENS), show_progress=False)
    backend.train_from_iterator([ascii_characters, *texts], trainer)
    backend.add_tokens([tokenizers.AddedToken(token, special=False, normalized=False) for token in THOUGHT_TOKENS])
    backend.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
