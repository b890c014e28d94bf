"""A model small enough that a step takes milliseconds."""

import pytest

from engine import ChatTemplate, Engine, EngineConfig
from rl.config import EnvironmentConfig, NewModelConfig, ScheduleConfig, TrainConfig
from rl.fresh_model import write_fresh_model
from rl.rollout import Collector

SMALL = NewModelConfig(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    head_dim=16, max_position_embeddings=128, initializer_range=0.1,
)  # fmt: skip
SMALL_ENGINE = EngineConfig(kv_tokens=4096, train_batch_tokens=1024, threads=1)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A Hugging Face directory with random weights."""
    directory = tmp_path_factory.mktemp("model") / "fresh"
    write_fresh_model(directory, SMALL, ["0123456789+="], seed=0)
    return str(directory)


@pytest.fixture
def collector(model):
    """Makes a collector on a fresh engine for an environment."""
    made = []

    def make(env, **options):
        engine = Engine.from_pretrained(model, SMALL_ENGINE)
        made.append(Collector(engine, env, ChatTemplate.from_pretrained(model), **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def train_config(model, tmp_path):
    """A configuration of the letters environment; keyword arguments replace its keys."""

    def make(**keys):
        defaults = {
            "run_dir": str(tmp_path / "run"),
            "model": model,
            "steps": 3,
            "prompts_per_step": 4,
            "group_size": 4,
            "max_tokens": 6,
            "env": EnvironmentConfig(name="tests.rl.toy:Letters"),
            "schedule": ScheduleConfig(learning_rate=1e-2),
            "engine": SMALL_ENGINE,
        }
        return TrainConfig(**(defaults | keys))

    return make
