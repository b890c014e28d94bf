"""What a run is: the keys of the TOML files that `python -m rl` reads."""

from __future__ import annotations

from typing import Any

import msgspec

from engine import ConfigError, EngineConfig, LossConfig, ParallelConfig, learning_rate
from rl.advantage import ADVANTAGES


def _at_least(config: msgspec.Struct, limit: int, *names: str) -> None:
    for name in names:
        if getattr(config, name) < limit:
            raise ConfigError(f"{type(config).__name__}.{name} is {getattr(config, name)}; it must be at least {limit}")


def _share_out(config: TrainConfig | SFTConfig) -> None:
    """Makes `parallel` and `engine.parallel` one. Raises ConfigError where both are given and differ."""
    plain, inner = ParallelConfig(), config.engine.parallel
    if config.parallel not in (plain, inner) and inner != plain:
        raise ConfigError("parallel and engine.parallel are both given, and differ; give parallel alone")
    chosen = inner if config.parallel == plain else config.parallel
    msgspec.structs.force_setattr(config, "parallel", chosen)
    msgspec.structs.force_setattr(config, "engine", msgspec.structs.replace(config.engine, parallel=chosen))


class EnvironmentConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Which environment: a file of `rl/envs`, or "module:Class"; `arguments` go to its constructor."""

    name: str
    arguments: dict[str, Any] = {}


class ScheduleConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The learning rate: linear warm-up over `warmup_steps`, then "constant", or "cosine" down to `final_share` of it
    at the last step."""

    learning_rate: float
    shape: str = "constant"
    warmup_steps: int = 0
    final_share: float = 0.1

    def at(self, step: int, steps: int) -> float:
        """The rate of step `step` (from 0) of `steps`: a function of the step alone, so a resumed run goes on where
        it was. Raises ConfigError."""
        return learning_rate(step, self.learning_rate, self.warmup_steps, steps, self.shape, self.final_share)


class EvaluationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Pass@1 on held-out problems: `problems` of them, averaged over `samples` each. Temperature 0 is greedy."""

    problems: int = 256
    samples: int = 1
    temperature: float = 1.0
    max_tokens: int = 64
    seed: int = 1_000_003
    every: int = 0  # steps between evaluations in training; 0: none
    thinking: bool = True  # the mode of evaluations in training

    def __post_init__(self) -> None:
        _at_least(self, 1, "problems", "samples", "max_tokens")
        _at_least(self, 0, "every")


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True):
    """GRPO and its relatives: `python -m rl train`.

    Each step launches `group_size` rollouts of each of `prompts_per_step` problems. Groups whose rewards are all equal
    teach nothing and are filtered; up to `resample_rounds` times a step they are replaced by new problems. Rewards
    fall linearly to -1 over the last `overlong_tokens` of `max_tokens` (0: no such penalty). `check_filtered` scores
    the filtered rollouts too, so that the exactness check covers every sampled token. `parallel` is how the ranks that
    torchrun started share the work: `EngineConfig.parallel` by a shorter name.
    """

    run_dir: str
    model: str  # a Hugging Face directory with tokenizer and chat template
    steps: int
    env: EnvironmentConfig
    schedule: ScheduleConfig
    seed: int = 0
    prompts_per_step: int = 32
    group_size: int = 8
    max_tokens: int = 256  # of a turn
    max_prompt_tokens: int = 2048
    max_turns: int = 16
    temperature: float = 1.0
    advantage: str = "dr_grpo"
    scale_by_batch_std: bool = False
    loss: LossConfig = LossConfig(name="dapo")
    resample_rounds: int = 0
    overlong_tokens: int = 0
    check_filtered: bool = True
    save_every: int = 20
    keep_rollouts_every: int = 5  # steps between groups kept for the report
    evaluation: EvaluationConfig = EvaluationConfig()
    parallel: ParallelConfig = ParallelConfig()
    engine: EngineConfig = EngineConfig()

    def __post_init__(self) -> None:
        _share_out(self)
        if self.advantage not in ADVANTAGES:
            raise ConfigError(f'advantage is "{self.advantage}"; there are {", ".join(ADVANTAGES)}')
        if not self.temperature > 0.0:
            raise ConfigError(f"temperature is {self.temperature}; rollouts must be sampled, above 0")
        if self.group_size < 2:
            raise ConfigError(f"group_size is {self.group_size}; an advantage compares at least 2 rollouts")
        self.schedule.at(0, self.steps)  # a schedule that cannot be is refused now, not at its first step
        _at_least(self, 1, "steps", "prompts_per_step", "max_tokens", "max_prompt_tokens", "max_turns", "save_every")
        _at_least(self, 0, "resample_rounds", "overlong_tokens", "keep_rollouts_every")


class NewModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A model with random weights and a character tokenizer made from the corpus, to start from nothing."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 1024
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True


class SFTConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Supervised fine-tuning: `python -m rl sft`.

    `data` is JSONL with `messages` (and `thinking`, if conversations differ in it) a line. Each step takes the next
    conversations of a shuffled pass until they hold `tokens_per_step` tokens. Exactly one of `model` (a Hugging Face
    directory) and `new_model` says where to begin. With an `env`, questions of its held-out split are left out of the
    data, and, from the evaluation at which held-out accuracy reaches `stop_at_accuracy` on, training stops. `parallel`
    is how the ranks that torchrun started share the work: `EngineConfig.parallel` by a shorter name.
    """

    run_dir: str
    data: str
    steps: int
    schedule: ScheduleConfig
    model: str | None = None
    new_model: NewModelConfig | None = None
    env: EnvironmentConfig | None = None
    seed: int = 0
    tokens_per_step: int = 8192
    max_tokens: int = 1024  # longer conversations are left out, and counted
    stop_at_accuracy: float | None = None
    save_every: int = 100
    evaluation: EvaluationConfig = EvaluationConfig()
    parallel: ParallelConfig = ParallelConfig()
    engine: EngineConfig = EngineConfig()

    def __post_init__(self) -> None:
        _share_out(self)
        if (self.model is None) == (self.new_model is None):
            raise ConfigError("give exactly one of model (a Hugging Face directory) and [new_model] (random weights)")
        if self.env is None and (self.stop_at_accuracy is not None or self.evaluation.every):
            raise ConfigError("stop_at_accuracy and evaluation.every need an [env] to pose held-out problems")
        self.schedule.at(0, self.steps)
        _at_least(self, 1, "steps", "tokens_per_step", "max_tokens", "save_every")
