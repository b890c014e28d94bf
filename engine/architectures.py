"""One row per Hugging Face architecture: what tells the families apart, as data, and `config.json` in both dialects.

The families share one forward (RMSNorm, rotary attention, SwiGLU). What differs is which projections have a bias,
whether queries and keys are normed per head, and whether attention looks back through a window. Dropout is not read:
the engine trains on the distribution it samples from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from engine.config import ModelConfig
from engine.errors import ConfigError, nearest


@dataclass(frozen=True)
class Architecture:
    """What one family does.

    The booleans are what holds when the configuration says nothing. `keys` are the optional keys that the family
    reads at all; where it reads "attention_bias" but not "attention_out_bias", the former speaks for the output
    projection too. `defaults` are the values that its `config.json` may leave out.
    """

    name: str
    model_type: str
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    keys: frozenset[str] = frozenset()
    defaults: dict[str, Any] = field(default_factory=dict)

    def has_qkv_bias(self, config: ModelConfig) -> bool:
        """Whether the query, key and value projections have one."""
        return self.qkv_bias if config.attention_bias is None else config.attention_bias

    def has_out_bias(self, config: ModelConfig) -> bool:
        """Whether the attention's output projection has one."""
        if "attention_out_bias" in self.keys:
            return self.out_bias if config.attention_out_bias is None else config.attention_out_bias
        return self.has_qkv_bias(config) if "attention_bias" in self.keys else self.out_bias

    def has_mlp_bias(self, config: ModelConfig) -> bool:
        """Whether gate, up and down have one."""
        return self.mlp_bias if config.mlp_bias is None else config.mlp_bias

    def window(self, config: ModelConfig) -> int | None:
        """How many keys a query sees, its own included; None: all before it."""
        return config.sliding_window


ARCHITECTURES = {
    row.name: row
    for row in (
        Architecture(
            name="LlamaForCausalLM",
            model_type="llama",
            keys=frozenset({"attention_bias", "mlp_bias"}),
            defaults={"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
        ),
        Architecture(
            name="MistralForCausalLM",
            model_type="mistral",
            keys=frozenset({"sliding_window"}),
            defaults={
                "max_position_embeddings": 131072,
                "num_key_value_heads": 8,
                "sliding_window": 4096,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
        ),
        Architecture(
            name="Qwen2ForCausalLM",
            model_type="qwen2",
            qkv_bias=True,
            keys=frozenset({"sliding_window", "use_sliding_window"}),
            defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
        ),
        Architecture(
            name="Qwen3ForCausalLM",
            model_type="qwen3",
            qk_norm=True,
            keys=frozenset({"attention_bias", "sliding_window", "use_sliding_window"}),
            defaults={
                "max_position_embeddings": 32768,
                "num_key_value_heads": 32,
                "head_dim": 128,
                "sliding_window": 4096,
            },
        ),
        Architecture(
            name="SeedOssForCausalLM",
            model_type="seed_oss",
            qkv_bias=True,
            keys=frozenset({"attention_bias", "attention_out_bias", "mlp_bias"}),
            defaults={
                "max_position_embeddings": 524288,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "bos_token_id": 0,
                "eos_token_id": 2,
                "pad_token_id": 1,
            },
        ),
    )
}

# What each kind of RoPE scaling must say, and may say; other types (longrope, dynamic) are refused.
ROPE_REQUIRED: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
ROPE_OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_COPIED = (
    *_REQUIRED,
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def architecture_of(config: ModelConfig) -> Architecture:
    """The row named by `config.architecture`, after checking that the configuration is one that the row can express.

    Raises ConfigError for an unknown name (with the nearest known one), for what the family cannot say (a bias on
    Mistral, a window on Llama: such a model could not be saved as what it is), and for a RoPE scaling not known.
    """
    row = _row(config.architecture)
    for key in ("attention_bias", "attention_out_bias", "mlp_bias", "sliding_window"):
        if getattr(config, key) is not None and key not in row.keys:
            others = [other.name for other in ARCHITECTURES.values() if key in other.keys]
            raise ConfigError(
                f"{key} is {getattr(config, key)}, but {row.name} has no such key; leave it out, or choose one of "
                f"{', '.join(others)}"
            )
    if config.sliding_window is not None and config.sliding_window < 1:
        raise ConfigError(f"sliding_window is {config.sliding_window}; it must be at least 1, or absent for none")
    _check_rope_scaling(config.rope_scaling)
    return row


def model_config_from_hf(data: dict[str, Any]) -> ModelConfig:
    """A `config.json` as a ModelConfig; reads what transformers 5 writes and what published checkpoints carry.

    Keys that have no bearing on the arithmetic are ignored. Raises ConfigError for a missing size, an unknown
    architecture, and everything that would change the arithmetic in a way the engine does not offer.
    """
    _check_kinds(data)
    row = _row_of_json(data)
    _refuse_foreign_arithmetic(data, row)
    values: dict[str, Any] = {"architecture": row.name, "rms_norm_eps": 1e-6}
    for key in _COPIED:
        value = data.get(key)
        if value is None and key in data and key.endswith("_token_id"):
            continue  # an explicit null says that there is no such token
        value = row.defaults.get(key) if value is None else value
        if value is not None:
            values[key] = value
    missing = [key for key in _REQUIRED if key not in values]
    if missing:
        raise ConfigError(f"config.json of {row.name} lacks {', '.join(missing)}; the model's shape needs them")
    for key in ("attention_bias", "attention_out_bias", "mlp_bias"):
        if key in row.keys and data.get(key) is not None:
            values[key] = data[key]
    values["sliding_window"] = _window_of_json(data, row, values["num_hidden_layers"])
    max_positions = values.get("max_position_embeddings", 0)
    values["rope_theta"], values["rope_scaling"] = _rope_of_json(data, max_positions)
    try:
        config = msgspec.convert(values, ModelConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"config.json of {row.name}: {error}") from None
    architecture_of(config)
    return config


def model_config_to_hf(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """`config.json` in both dialects at once, so that transformers 4 and 5 read the same model. Raises ConfigError."""
    row = architecture_of(config)
    dtype_name = str(dtype).removeprefix("torch.")
    scaling = _check_rope_scaling(config.rope_scaling)
    data: dict[str, Any] = {"architectures": [row.name], "model_type": row.model_type}
    data |= {key: getattr(config, key) for key in _COPIED}
    data |= {
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": config.rope_theta},
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
    }
    biases = {
        "attention_bias": row.has_qkv_bias(config),
        "attention_out_bias": row.has_out_bias(config),
        "mlp_bias": row.has_mlp_bias(config),
    }
    data |= {key: value for key, value in biases.items() if key in row.keys}
    window = row.window(config)
    if "sliding_window" in row.keys:
        data["sliding_window"] = window
    if "use_sliding_window" in row.keys:
        windowed = window is not None
        data["use_sliding_window"] = windowed
        data["max_window_layers"] = 0 if windowed else config.num_hidden_layers  # the first layer with a window
        data["layer_types"] = ["sliding_attention" if windowed else "full_attention"] * config.num_hidden_layers
    if row.model_type == "seed_oss":
        data["residual_dropout"] = 0.0  # transformers' own default is 0.1
    return data


def _check_kinds(data: dict[str, Any]) -> None:
    """The keys that are taken apart here must be of their kind; the plain ones are checked when they are converted."""
    kinds = {
        "a list": (list, ("architectures", "layer_types")),
        "an object": (dict, ("rope_parameters", "rope_scaling", "quantization_config")),
        "a number": (int | float, ("rope_theta", "max_window_layers", "max_position_embeddings", "num_hidden_layers")),
        "text": (str, ("model_type", "hidden_act")),
    }
    for wanted, (kind, keys) in kinds.items():
        for key in keys:
            if data.get(key) is not None and not isinstance(data[key], kind):
                raise ConfigError(f"config.json has {key}={data[key]!r:.80}; expected {wanted}")
    for key in ("architectures", "layer_types"):
        if not all(isinstance(item, str) for item in data.get(key) or []):
            raise ConfigError(f"config.json has {key}={data[key]!r:.80}; expected a list of names")


def _row(name: str) -> Architecture:
    if name not in ARCHITECTURES:
        known = list(ARCHITECTURES)
        raise ConfigError(f'unknown architecture "{name}"{nearest(name, known)}; the engine knows {", ".join(known)}')
    return ARCHITECTURES[name]


def _row_of_json(data: dict[str, Any]) -> Architecture:
    """`architectures` decides; a file without it goes by `model_type`."""
    by_type = {row.model_type: row for row in ARCHITECTURES.values()}
    names, model_type = data.get("architectures"), data.get("model_type")
    if names:
        row = _row(names[0])
        if model_type is not None and model_type != row.model_type:
            raise ConfigError(
                f'config.json says architecture {row.name} but model_type "{model_type}"; that architecture\'s is '
                f'"{row.model_type}": correct whichever is wrong'
            )
        return row
    if model_type not in by_type:
        raise ConfigError(
            f'config.json names no architecture and its model_type is "{model_type}"'
            f"{nearest(str(model_type), list(by_type))}; the engine knows {', '.join(by_type)}"
        )
    return by_type[model_type]


def _refuse_foreign_arithmetic(data: dict[str, Any], row: Architecture) -> None:
    activation = data.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ConfigError(f'hidden_act is "{activation}"; the engine\'s MLP is SwiGLU and takes "silu"')
    if data.get("quantization_config"):
        method = data["quantization_config"].get("quant_method", "unknown")
        raise ConfigError(f'the weights are quantised (quant_method "{method}"); save them dequantised first')
    for key in ("rope_parameters", "rope_scaling"):
        inner = data.get(key) or {}
        factor = inner.get("partial_rotary_factor")
        if factor not in (None, 1, 1.0):
            raise ConfigError(f"{key}.partial_rotary_factor is {factor}; the engine turns whole heads (1.0)")
    if data.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ConfigError(
            f"partial_rotary_factor is {data['partial_rotary_factor']}; the engine turns whole heads (1.0)"
        )
    if data.get("per_layer_config"):
        raise ConfigError("config.json has per_layer_config; the engine's layers are all alike")
    kinds = set(data.get("layer_types") or [])
    unknown = kinds - {"full_attention", "sliding_attention"}
    if unknown:
        raise ConfigError(f"layer_types has {', '.join(sorted(unknown))}; the engine has full and sliding attention")
    if len(kinds) > 1 or ("sliding_attention" in kinds and "sliding_window" not in row.keys):
        raise ConfigError(
            f"layer_types of this {row.name} is {', '.join(sorted(kinds))}; the engine's layers are all alike: "
            "every layer has the window or none has"
        )


def _window_of_json(data: dict[str, Any], row: Architecture, num_layers: int) -> int | None:
    if "sliding_window" not in row.keys:
        return None
    window = data["sliding_window"] if "sliding_window" in data else row.defaults["sliding_window"]
    if "use_sliding_window" not in row.keys or window is None:
        return window
    if not data.get("use_sliding_window", False):
        return None
    if data.get("layer_types"):
        return window if "sliding_attention" in data["layer_types"] else None
    first = data.get("max_window_layers", 28)  # layers from here on have the window
    if 0 < first < num_layers:
        raise ConfigError(
            f"max_window_layers is {first} of {num_layers} layers; the engine's layers are all alike: set it to 0 "
            f"(every layer has the window) or {num_layers} (none has)"
        )
    return window if first <= 0 else None


def _rope_of_json(data: dict[str, Any], max_positions: int) -> tuple[float, dict[str, Any] | None]:
    """(rope_theta, rope_scaling) out of either dialect. A file with both must say one thing."""
    found: list[tuple[float, dict[str, Any] | None]] = []
    for key in ("rope_parameters", "rope_scaling"):
        inner = dict(data.get(key) or {})
        if not inner:
            continue
        if any(isinstance(value, dict) for value in inner.values()):
            raise ConfigError(f"{key} differs by kind of layer ({', '.join(inner)}); the engine's layers are all alike")
        theta = inner.pop("rope_theta", None) or data.get("rope_theta") or 10000.0
        inner.pop("partial_rotary_factor", None)
        old_name = inner.pop("type", "default")
        inner.setdefault("rope_type", old_name)
        if inner["rope_type"] in ("llama3", "yarn"):
            # transformers lets the top-level key win and falls back on the context length.
            outer = data.get("original_max_position_embeddings")
            if outer is not None:
                inner["original_max_position_embeddings"] = outer
            inner.setdefault("original_max_position_embeddings", max_positions)
        found.append((float(theta), _check_rope_scaling(inner)))
    if not found:
        return float(data.get("rope_theta") or 10000.0), None
    if found[0] != found[-1]:
        raise ConfigError(
            f"rope_parameters ({found[0]}) and rope_scaling ({found[-1]}) disagree; remove the one that is wrong"
        )
    return found[0]


def _check_rope_scaling(scaling: dict[str, Any] | None) -> dict[str, Any] | None:
    """The dictionary with its type under `rope_type`, or None where it scales nothing. Raises ConfigError."""
    if not scaling:
        return None
    inner = {key: value for key, value in scaling.items() if value is not None}
    old_name = inner.pop("type", "default")
    kind = inner.pop("rope_type", old_name)
    known = ["default", *ROPE_REQUIRED]
    if kind not in known:
        raise ConfigError(f'rope_type is "{kind}"{nearest(str(kind), known)}; the engine knows {", ".join(known)}')
    required, optional = ROPE_REQUIRED.get(kind, ()), ROPE_OPTIONAL.get(kind, ())
    wanted = [*required, *optional]
    if unknown := sorted(set(inner) - set(wanted)):
        raise ConfigError(
            f'RoPE scaling "{kind}" has no key "{unknown[0]}"{nearest(unknown[0], wanted)}; '
            f"it knows {', '.join(wanted) or 'none'}"
        )
    for key in required:
        if key not in inner:
            raise ConfigError(f'RoPE scaling "{kind}" needs {key}, a number above 0')
    for key, value in inner.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        if not (isinstance(value, bool) if key == "truncate" else number):
            kind_wanted = "true or false" if key == "truncate" else "a number above 0"
            raise ConfigError(f'RoPE scaling "{kind}" has {key}={value!r}; expected {kind_wanted}')
    if kind == "llama3" and inner["low_freq_factor"] >= inner["high_freq_factor"]:
        raise ConfigError(
            f"RoPE scaling llama3 has low_freq_factor {inner['low_freq_factor']} and high_freq_factor "
            f"{inner['high_freq_factor']}; the first must be the smaller"
        )
    return {"rope_type": kind, **inner} if required else None
