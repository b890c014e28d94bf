"""Caduceus: one process, one copy of the weights, one forward for rollouts and gradients.

Public names load lazily, so that importing one kernel does not load the trainer.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "Engine": "engine.engine",
    "EngineConfig": "engine.config",
    "ModelConfig": "engine.config",
    "OptimizerConfig": "engine.config",
    "ParallelConfig": "engine.config",
    "load_config": "engine.config",
    "SamplingParams": "engine.types",
    "Completion": "engine.types",
    "StreamEvent": "engine.types",
    "Sample": "engine.types",
    "TrainStats": "engine.types",
    "StepStats": "engine.types",
    "LossBatch": "engine.losses",
    "LossConfig": "engine.losses",
    "learning_rate": "engine.optim",
    "Tokenizer": "engine.tokenizer",
    "ChatTemplate": "engine.chat",
    "EngineError": "engine.errors",
    "ConfigError": "engine.errors",
    "InputError": "engine.errors",
    "CheckpointError": "engine.errors",
    "CapacityError": "engine.errors",
    "ExactnessError": "engine.errors",
    "NumericsError": "engine.errors",
    "ParallelError": "engine.errors",
    "Mesh": "engine.parallel.mesh",
    "Ranks": "engine.parallel.ranks",
    "is_main_rank": "engine.parallel.launch",
    "report_failure": "engine.parallel.failure",
    "times_restarted": "engine.parallel.launch",
}

__all__ = list(_PUBLIC)

if TYPE_CHECKING:
    from engine.chat import ChatTemplate
    from engine.config import EngineConfig, ModelConfig, OptimizerConfig, ParallelConfig, load_config
    from engine.engine import Engine
    from engine.errors import (
        CapacityError,
        CheckpointError,
        ConfigError,
        EngineError,
        ExactnessError,
        InputError,
        NumericsError,
        ParallelError,
    )
    from engine.losses import LossBatch, LossConfig
    from engine.optim import learning_rate
    from engine.parallel.failure import report_failure
    from engine.parallel.launch import is_main_rank, times_restarted
    from engine.parallel.mesh import Mesh
    from engine.parallel.ranks import Ranks
    from engine.tokenizer import Tokenizer
    from engine.types import Completion, Sample, SamplingParams, StepStats, StreamEvent, TrainStats


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
