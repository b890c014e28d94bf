"""config.json in both dialects, the rows of the families."""

import pytest
import torch

from engine.architectures import (
    ARCHITECTURES,
    architecture_of,
    model_config_from_hf,
    model_config_to_hf,
)
from engine.errors import ConfigError
from tests.tiny import FAMILIES, LLAMA3_SCALING, tiny_config

PUBLISHED_LLAMA = {  # the keys of a Llama 3.1 checkpoint as published, made small
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 5,
    "eos_token_id": [6, 7],
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "mlp_bias": False,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3_SCALING,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0",
    "use_cache": True,
    "vocab_size": 304,
}


def without(data, *keys):
    return {key: value for key, value in data.items() if key not in keys}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_written_and_read_back_unchanged(family):
    config = tiny_config(family, rope_theta=50000.0, eos_token_id=[2, 3], tie_word_embeddings=True)
    assert model_config_from_hf(model_config_to_hf(config, torch.bfloat16)) == config_with_biases_named(config)


def config_with_biases_named(config):
    """Writing states the biases that the family's key could switch."""
    import msgspec

    row = architecture_of(config)
    named = {
        "attention_bias": row.has_qkv_bias(config),
        "attention_out_bias": row.has_out_bias(config),
        "mlp_bias": row.has_mlp_bias(config),
    }
    return msgspec.structs.replace(config, **{key: value for key, value in named.items() if key in row.keys})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dialect", ["transformers 5", "transformers 4"])
def test_either_dialect_alone_suffices(family, dialect):
    config = tiny_config(family, rope_theta=50000.0)
    written = model_config_to_hf(config, torch.float32)
    foreign = ("rope_theta", "rope_scaling", "torch_dtype") if dialect == "transformers 5" else ("rope_parameters",)
    assert model_config_from_hf(without(written, *foreign)) == model_config_from_hf(written)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_same_model_from_what_is_written(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    import json

    config = tiny_config(family, rope_theta=50000.0)
    (tmp_path / "config.json").write_text(json.dumps(model_config_to_hf(config, torch.bfloat16)))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    for key in ("vocab_size", "hidden_size", "head_dim", "num_key_value_heads", "rms_norm_eps", "eos_token_id"):
        assert getattr(theirs, key) == getattr(config, key), key
    assert theirs.dtype == torch.bfloat16
    assert theirs.rope_parameters["rope_theta"] == 50000.0
    assert theirs.rope_parameters["rope_type"] == (config.rope_scaling or {"rope_type": "default"})["rope_type"]
    assert getattr(theirs, "sliding_window", None) == config.sliding_window


def test_published_llama_config_is_read():
    config = model_config_from_hf(PUBLISHED_LLAMA)
    assert (config.rope_theta, config.head_dim, config.eos_token_ids) == (500000.0, 16, (6, 7))
    assert config.rope_scaling == LLAMA3_SCALING


@pytest.mark.parametrize(
    ("family", "facts"),
    [
        ("LlamaForCausalLM", (False, False, False, False)),
        ("MistralForCausalLM", (False, False, False, False)),
        ("Qwen2ForCausalLM", (True, False, False, False)),
        ("Qwen3ForCausalLM", (False, False, False, True)),
        ("SeedOssForCausalLM", (True, False, False, False)),
    ],
)
def test_rows_state_the_biases_and_norms_of_the_family(family, facts):
    config = tiny_config(family)
    row = architecture_of(config)
    assert (row.has_qkv_bias(config), row.has_out_bias(config), row.has_mlp_bias(config), row.qk_norm) == facts


def test_llama_attention_bias_speaks_for_the_output_projection_too():
    config = tiny_config(attention_bias=True, mlp_bias=True)
    row = architecture_of(config)
    assert row.has_qkv_bias(config) and row.has_out_bias(config) and row.has_mlp_bias(config)


def test_seed_oss_output_bias_has_its_own_key():
    config = tiny_config("SeedOssForCausalLM", attention_bias=False, attention_out_bias=True)
    row = architecture_of(config)
    assert (row.has_qkv_bias(config), row.has_out_bias(config)) == (False, True)


def test_bias_that_the_family_cannot_say_is_refused():
    with pytest.raises(ConfigError, match=r"MistralForCausalLM has no such key.*LlamaForCausalLM"):
        architecture_of(tiny_config("MistralForCausalLM", attention_bias=True))


def test_window_on_a_family_without_one_is_refused():
    with pytest.raises(ConfigError, match="sliding_window is 8, but LlamaForCausalLM"):
        architecture_of(tiny_config(sliding_window=8))


@pytest.mark.parametrize(
    ("change", "window"),
    [
        ({}, None),  # use_sliding_window is absent
        ({"use_sliding_window": False, "sliding_window": 16}, None),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}, None),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, 16),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 1}, None),
        ({"use_sliding_window": True, "sliding_window": 16, "layer_types": ["sliding_attention"] * 2}, 16),
    ],
)
def test_qwen_window_holds_only_where_it_is_switched_on(change, window):
    written = without(
        model_config_to_hf(tiny_config("Qwen2ForCausalLM"), torch.float32),
        "use_sliding_window",
        "sliding_window",
        "max_window_layers",
        "layer_types",
    )
    assert model_config_from_hf(written | change).sliding_window == window


def test_mistral_without_the_key_has_the_default_window_and_null_has_none():
    written = model_config_to_hf(tiny_config("MistralForCausalLM"), torch.float32)
    assert model_config_from_hf(without(written, "sliding_window")).sliding_window == 4096
    assert model_config_from_hf(written | {"sliding_window": None}).sliding_window is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "longrope"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": True}}, "beta_fast=True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": 1}}, "truncate=1"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1.0}}, "factor=-1.0"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic"),
        ({"rope_scaling": {"type": "linear", "factr": 4.0}}, 'did you mean "factor"'),
        ({"rope_scaling": {"type": "linear"}}, "needs factor"),
        ({"rope_scaling": {**LLAMA3_SCALING, "low_freq_factor": 8.0}}, "must be the smaller"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "disagree"),
        ({"rope_scaling": None, "rope_parameters": {"full_attention": {"rope_type": "default"}}}, "kind of layer"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "all alike"),
        ({"layer_types": ["linear_attention"] * 2}, "linear_attention"),
        ({"architectures": ["LlamaForCausalLN"]}, 'did you mean "LlamaForCausalLM"'),
        ({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}, "unknown architecture"),
        ({"model_type": "mistral"}, "correct whichever is wrong"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_key_value_heads": 3}, "choose a divisor"),
    ],
)
def test_what_would_change_the_arithmetic_is_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        model_config_from_hf(PUBLISHED_LLAMA | change)


def test_mixed_qwen_windows_are_refused():
    written = without(model_config_to_hf(tiny_config("Qwen3ForCausalLM"), torch.float32), "layer_types")
    with pytest.raises(ConfigError, match="max_window_layers is 1 of 2 layers"):
        model_config_from_hf(written | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1})


def test_missing_size_is_named():
    with pytest.raises(ConfigError, match="lacks intermediate_size"):
        model_config_from_hf(without(PUBLISHED_LLAMA, "intermediate_size"))


def test_harmless_unknown_keys_are_ignored():
    assert model_config_from_hf(PUBLISHED_LLAMA | {"favourite_colour": "blue"}) == model_config_from_hf(PUBLISHED_LLAMA)


@pytest.mark.parametrize("junk", ["text", -3, 2.5, [], ["x", 1], {}, {"type": 4, "factor": "x"}, True, [[None]]])
def test_junk_under_any_key_is_a_config_error_or_harmless(junk):
    written = model_config_to_hf(tiny_config("Qwen3ForCausalLM"), torch.float32) | {"quantization_config": None}
    for key in written:
        try:
            config = model_config_from_hf(written | {key: junk})
        except ConfigError as error:
            assert str(error)
        else:
            assert architecture_of(config).name == "Qwen3ForCausalLM"


def test_yarn_falls_back_on_the_context_length():
    scaling = {"type": "yarn", "factor": 4.0, "beta_fast": None, "truncate": False}
    assert model_config_from_hf(PUBLISHED_LLAMA | {"rope_scaling": scaling}).rope_scaling == {
        "rope_type": "yarn",
        "factor": 4.0,
        "truncate": False,
        "original_max_position_embeddings": 512,
    }


def test_explicit_null_token_id_stays_null():
    assert model_config_from_hf(PUBLISHED_LLAMA | {"bos_token_id": None}).bos_token_id is None
    assert model_config_from_hf(without(PUBLISHED_LLAMA, "bos_token_id")).bos_token_id == 1


def test_model_type_alone_names_the_family():
    assert model_config_from_hf(without(PUBLISHED_LLAMA, "architectures")).architecture == "LlamaForCausalLM"
    with pytest.raises(ConfigError, match='did you mean "llama"'):
        model_config_from_hf(without(PUBLISHED_LLAMA, "architectures") | {"model_type": "lama"})


def test_architecture_of_names_the_nearest():
    assert architecture_of(tiny_config()) is ARCHITECTURES["LlamaForCausalLM"]
    with pytest.raises(ConfigError, match='did you mean "Qwen3ForCausalLM"'):
        architecture_of(tiny_config("Qwen3ForCausalM"))
