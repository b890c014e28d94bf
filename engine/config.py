"""Configurations: what the model is, and how the engine runs it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from engine.errors import ConfigError, nearest

T = TypeVar("T", bound=msgspec.Struct)


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of a model, in the names of Hugging Face's `config.json`.

    `rope_scaling` is Hugging Face's dictionary ({"rope_type": "llama3", "factor": ...}) or None. `head_dim` and
    `num_key_value_heads` default to hidden_size / num_attention_heads and num_attention_heads. What an architecture
    adds beyond these numbers (biases, q/k norm) is its row in `architectures.py`, looked up by `architecture`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0
    head_dim: int = 0
    architecture: str = "LlamaForCausalLM"
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool | None = None  # None: the architecture's own default
    attention_out_bias: bool | None = None
    mlp_bias: bool | None = None
    sliding_window: int | None = None
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        set_ = msgspec.structs.force_setattr
        if not self.num_key_value_heads:
            set_(self, "num_key_value_heads", self.num_attention_heads)
        if not self.head_dim:
            set_(self, "head_dim", self.hidden_size // max(1, self.num_attention_heads))
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"ModelConfig.{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads is {self.num_attention_heads}, which num_key_value_heads "
                f"({self.num_key_value_heads}) does not divide; choose a divisor"
            )
        if self.head_dim % 16:
            raise ConfigError(f"head_dim is {self.head_dim}; the kernels take multiples of 16")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End-of-sequence ids, none, one or several."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)


class OptimizerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """AdamW (arXiv 1711.05101) with fp32 master weights. Norm weights and biases are not decayed."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0: no clipping


DTYPES = ("bfloat16", "float16", "float32", "float64")
KV_DTYPE_NAMES = ("auto", "fp8_e4m3")  # "auto" is the model's own
DEVICES = ("auto", "cpu", "cuda")
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble")


class ParallelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How the ranks that torchrun started share the work: a grid of dp x pp x cp x tp of them.

    `dp=0` takes as many data-parallel replicas as the ranks allow. `sequence_parallel` deals the rows of norms and
    residuals over tensor-parallel ranks (arXiv 2205.05198) in training and scoring. `schedule` is the pipeline's;
    "interleaved" puts `virtual_stages` chunks of layers on each rank (0: two). A gradient is summed in
    `gradient_lanes` lanes (0: one for each replica) that are folded in order, each of at least `micro_batches`
    micro-batches where there are that many samples (0: 1 without a pipeline, 2 pp with one). The tokens of a
    micro-batch are summed in `context_lanes` lanes, a multiple of cp (0: one for each context-parallel rank); each of
    them that a rank has beyond its first takes memory for all gradients once more. Lanes and micro-batches, not the
    ranks of dp, pp and cp, decide a gradient's bits. `timeout_seconds` is how long a collective may wait.
    """

    dp: int = 0
    pp: int = 1
    cp: int = 1
    tp: int = 1
    sequence_parallel: bool = True
    schedule: str = "1f1b"
    micro_batches: int = 0
    virtual_stages: int = 0
    gradient_lanes: int = 0
    context_lanes: int = 0
    timeout_seconds: float = 1800.0

    def __post_init__(self) -> None:
        for name, least in (("dp", 0), ("pp", 1), ("cp", 1), ("tp", 1), ("micro_batches", 0), ("virtual_stages", 0),
                            ("gradient_lanes", 0), ("context_lanes", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise ConfigError(f"ParallelConfig.{name} is {getattr(self, name)}; it must be at least {least}")
        if self.context_lanes % self.cp:
            raise ConfigError(
                f"ParallelConfig.context_lanes is {self.context_lanes}, which cp = {self.cp} ranks cannot share; "
                f"set it to a multiple of {self.cp}, or to 0 for one lane on each rank"
            )
        if self.schedule not in SCHEDULES:
            raise ConfigError(
                f'ParallelConfig.schedule is "{self.schedule}"{nearest(self.schedule, list(SCHEDULES))}; there are '
                f"{', '.join(SCHEDULES)}"
            )
        if (self.schedule == "interleaved") != (self.chunks_per_stage > 1):
            raise ConfigError(
                f'ParallelConfig.virtual_stages is {self.virtual_stages} with schedule "{self.schedule}"; only '
                '"interleaved" has several chunks of layers on a rank, and it needs at least 2'
            )
        if not self.timeout_seconds > 0:
            raise ConfigError(f"ParallelConfig.timeout_seconds is {self.timeout_seconds}; it must be above 0")

    @property
    def chunks_per_stage(self) -> int:
        """Chunks of layers on each rank."""
        return self.virtual_stages or (2 if self.schedule == "interleaved" else 1)

    @property
    def least_micro_batches(self) -> int:
        """Micro-batches of a lane, where there are that many samples."""
        return self.micro_batches or (2 * self.pp if self.pp > 1 else 1)


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How the engine runs.

    `device` is "cuda", "cpu", or "auto": a GPU where there is one, else the CPU. Under torchrun each rank takes the GPU
    of its number on its machine (LOCAL_RANK).

    `dtype` is "bfloat16", "float32", "float16" (where kernels compute in it: on a GPU), or "float64", which is slow: no
    kernel computes in it, only the torch definitions, on the CPU. It is there to check gradients (optimizer state and
    trained log-probabilities are float64 too; tokens are drawn from logits rounded to float32, and
    `Completion.logprobs` are those), and it is not exact.

    `kv_dtype` is what keys and values are rounded to and kept in: "auto", the model's dtype, or "fp8_e4m3", which takes
    half the room of bfloat16. Scoring and training round alike, so log-probabilities still agree to the bit.

    `kv_tokens` is the size of the KV pool in tokens; `page_size` a multiple of 16; `max_batch_tokens` the most tokens
    of one sampling step (prompts longer than it are prefilled in chunks); `max_seqs` the most sequences of one step;
    `train_batch_tokens` the most tokens of one training micro-batch (a longer single sample has one to itself).
    `threads=0` uses every core the process may run on, or its share of them where several ranks share a machine.
    """

    device: str = "auto"
    dtype: str = "bfloat16"
    kv_dtype: str = "auto"
    kv_tokens: int = 65536
    page_size: int = 16
    max_batch_tokens: int = 2048
    max_seqs: int = 256
    prefix_caching: bool = True
    train_batch_tokens: int = 8192
    activation_checkpointing: bool = False
    threads: int = 0
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f'EngineConfig.dtype is "{self.dtype}"; the engine offers {", ".join(DTYPES)}')
        if self.kv_dtype not in KV_DTYPE_NAMES:
            raise ConfigError(
                f'EngineConfig.kv_dtype is "{self.kv_dtype}"{nearest(self.kv_dtype, list(KV_DTYPE_NAMES))}; there are '
                f"{', '.join(KV_DTYPE_NAMES)}"
            )
        if self.device not in DEVICES:
            raise ConfigError(
                f'EngineConfig.device is "{self.device}"{nearest(self.device, list(DEVICES))}; there are '
                f"{', '.join(DEVICES)}, and which GPU a rank takes is its LOCAL_RANK or CUDA_VISIBLE_DEVICES"
            )
        if self.page_size < 16 or self.page_size % 16:
            raise ConfigError(f"EngineConfig.page_size is {self.page_size}; it must be a multiple of 16")
        for name in ("kv_tokens", "max_batch_tokens", "max_seqs", "train_batch_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"EngineConfig.{name} is {getattr(self, name)}; it must be at least 1")
        if self.kv_tokens < self.page_size:
            raise ConfigError(f"kv_tokens is {self.kv_tokens}, less than one page of {self.page_size}")


def parse(kind: type[T], data: dict[str, Any], where: str = "") -> T:
    """`data` as a struct of `kind`; an unknown key is refused with the nearest known one.

    Raises ConfigError.
    """
    _refuse_unknown(kind, data, where or kind.__name__)
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where or kind.__name__}: {error}") from None


def _refuse_unknown(kind: type[msgspec.Struct], data: dict[str, Any], where: str) -> None:
    fields = {f.encode_name: f.type for f in msgspec.structs.fields(kind)}
    for key, value in data.items():
        if key not in fields:
            raise ConfigError(f'{where} has no key "{key}"{nearest(key, list(fields))}; it knows {", ".join(fields)}')
        inner = fields[key]
        if isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            _refuse_unknown(inner, value, f"{where}.{key}")


def load_config(kind: type[T], path: str | Path, overrides: list[str] = ()) -> T:  # type: ignore[assignment]
    """A TOML file as a struct; each override is `key.inner=value` with a TOML value (bare words are strings).

    Raises ConfigError.
    """
    try:
        data = tomllib.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"no such configuration file: {path}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f'override "{item}" is not of the form key=value')
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            value = text
        at = data
        *outer, last = key.strip().split(".")
        for name in outer:
            at = at.setdefault(name, {})
            if not isinstance(at, dict):
                raise ConfigError(f'override "{item}": "{name}" is a value, not a table with keys of its own')
        at[last] = value
    return parse(kind, data, str(path))
