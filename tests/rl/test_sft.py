"""Supervised fine-tuning: what is trained on, in which order, and how it goes on after a stop."""

import json
import signal
from pathlib import Path

import pytest

from engine import ChatTemplate, ConfigError
from rl.config import EnvironmentConfig, EvaluationConfig, ScheduleConfig, SFTConfig
from rl.envs.arithmetic import Arithmetic
from rl.metrics import read_lines
from rl.progress import Progress
from rl.sft import read_conversations, sft, shuffled_batches, to_samples
from tests.rl.conftest import SMALL, SMALL_ENGINE


@pytest.fixture
def data(tmp_path):
    """Forty sums, every other one thought about."""
    rows = []
    for left in range(10, 50):
        thinking = left % 2 == 0
        answer = f"<think>{left}, 11</think>{left + 11}" if thinking else str(left + 11)
        messages = [{"role": "user", "content": f"{left}+11="}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "thinking": thinking, "provenance": {}})
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def sft_config(data, tmp_path):
    def make(**keys):
        defaults = {
            "run_dir": str(tmp_path / "sft"),
            "data": str(data),
            "steps": 6,
            "new_model": SMALL,
            "tokens_per_step": 200,
            "schedule": ScheduleConfig(learning_rate=1e-2),
            "engine": SMALL_ENGINE,
        }
        return SFTConfig(**(defaults | keys))

    return make


def test_only_what_the_assistant_writes_is_trained_on(data, model):
    template = ChatTemplate.from_pretrained(model)
    for sample in to_samples(read_conversations(data, None), template, 100)[:4]:
        trained = [token for token, mask in zip(sample.tokens, sample.loss_mask, strict=True) if mask]
        text = template.tokenizer.decode(trained, skip_special_tokens=False)
        whole = template.tokenizer.decode(sample.tokens, skip_special_tokens=False)
        assert whole.endswith("<|assistant|>" + text) and text.endswith("<|end|>")
        assert whole.startswith("<|thinking|>") == text.startswith("<think>")


def test_held_out_questions_are_left_out(data):
    env = Arithmetic()
    everything, kept = read_conversations(data, None), read_conversations(data, env)
    questions = {conversation.messages[0]["content"] for conversation in everything}
    assert {c.messages[0]["content"] for c in kept} == {q for q in questions if not env.is_held_out(q)} < questions


def test_each_pass_takes_every_sample_once_and_in_its_own_order(data, model, sft_config):
    samples = to_samples(read_conversations(data, None), ChatTemplate.from_pretrained(model), 100)
    batches = shuffled_batches(samples, sft_config())
    taken = []
    while len(taken) < 2 * len(samples):
        taken += [sample.tokens for sample in next(batches)]
    first, second = taken[: len(samples)], taken[len(samples) : 2 * len(samples)]
    assert sorted(first) == sorted(second) == sorted(sample.tokens for sample in samples) and first != second


def test_batches_go_on_where_a_stopped_run_was(data, model, sft_config):
    samples = to_samples(read_conversations(data, None), ChatTemplate.from_pretrained(model), 100)
    through = shuffled_batches(samples, sft_config())
    for _ in range(7):
        expected = next(through)
    assert next(shuffled_batches(samples, sft_config(), skip=6)) == expected


def test_loss_falls(sft_config):
    config = sft_config(steps=20)
    assert sft(config)
    losses = [line["loss"] for line in read_lines_of(config)]
    assert losses[0] > 3.0 > 2.0 > losses[-1]


def read_lines_of(config):
    return read_lines(Path(config.run_dir) / "metrics.jsonl")


class StopsAt(Progress):
    """Presses Ctrl-C after a step."""

    def __init__(self, step):
        super().__init__("sft")
        self.stop_step = step

    def advance(self, step, record):
        if step == self.stop_step:
            signal.raise_signal(signal.SIGINT)


def test_interrupted_and_resumed_run_equals_one_that_ran_through(sft_config, tmp_path):
    whole, parts = (sft_config(run_dir=str(tmp_path / name)) for name in ("whole", "parts"))
    assert sft(whole)
    assert not sft(parts, progress=StopsAt(3))
    assert sft(parts, resume=True)
    files = [(tmp_path / name / "checkpoint" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_training_stops_when_held_out_accuracy_is_enough(sft_config):
    env = EnvironmentConfig(name="tests.rl.toy:Letters")
    evaluation = EvaluationConfig(problems=2, max_tokens=2, every=2)
    config = sft_config(env=env, evaluation=evaluation, stop_at_accuracy=0.0)
    assert sft(config)
    assert len(read_lines_of(config)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no conversation"),
        ("{}\n", "line 1: not a JSON object"),
        ('{"messages": [{"role": "user"}]}\n', "line 1: not a JSON object"),
        ("[\n", "line 1: not a JSON object"),
    ],
)
def test_data_that_is_no_conversation_is_refused_with_its_line(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_conversations(path, None)


def test_missing_data_says_how_to_make_some(tmp_path):
    with pytest.raises(ConfigError, match="python -m forge run"):
        read_conversations(tmp_path / "none.jsonl", None)


def test_a_run_begins_from_a_model_or_from_nothing_not_both(sft_config):
    with pytest.raises(ConfigError, match="exactly one of"):
        sft_config(model="somewhere")
