"""Saved state: a run goes on bit for bit, whenever it was killed, and a damaged state is refused."""

import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from engine.errors import CheckpointError, InputError
from engine.state import load_state, save_state
from tests.engine.test_trainer import gradients, make_samples, make_trainer

ROOT = Path(__file__).resolve().parents[2]
STEPS = 14


def train_step(trainer, step):
    for part in range(2):
        trainer.forward_backward(make_samples(4, seed=10 * step + part), "sft")
    trainer.optim_step(1e-3)


def digest(trainer):
    """Of the compute weights and all optimizer state."""
    sha = hashlib.sha256()
    for weight in trainer.model.weights():
        moments = trainer.optimizer.state[weight.name]
        for tensor in (weight.data, moments.master, moments.exp_avg, moments.exp_avg_sq):
            sha.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_has_the_bits_of_one_never_stopped(tmp_path, dtype):
    whole = make_trainer(dtype)
    for step in range(6):
        train_step(whole, step)
    first = make_trainer(dtype)
    for step in range(3):
        train_step(first, step)
    save_state(tmp_path / "state", first, {"step": 3, "note": ["größer", 0.1, None]})
    second = make_trainer(dtype)
    assert load_state(tmp_path / "state", second) == {"step": 3, "note": ["größer", 0.1, None]}
    assert second.weight_version == 3
    for step in range(3, 6):
        train_step(second, step)
    assert digest(second) == digest(whole)


def test_accumulated_gradients_are_part_of_the_state(tmp_path):
    first, second = make_trainer(), make_trainer()
    first.forward_backward(make_samples(3), "sft")
    save_state(tmp_path / "state", first)
    load_state(tmp_path / "state", second)
    assert all(torch.equal(a, b) for a, b in zip(gradients(first), gradients(second), strict=True))
    first.optim_step(1e-3)
    second.optim_step(1e-3)
    assert digest(first) == digest(second)


def test_a_state_before_the_first_step_restores_the_weights(tmp_path):
    first, second = make_trainer("bfloat16"), make_trainer("bfloat16")
    second.model.initialize(1)
    save_state(tmp_path / "state", first)
    load_state(tmp_path / "state", second)
    assert all(torch.equal(a.data, b.data) for a, b in zip(first.model.weights(), second.model.weights(), strict=True))
    assert not second.optimizer.state


def test_loading_goes_back_and_drops_what_came_after(tmp_path):
    trainer = make_trainer()
    train_step(trainer, 0)
    save_state(tmp_path / "state", trainer)
    before = digest(trainer)
    train_step(trainer, 1)
    trainer.forward_backward(make_samples(2), "sft")
    load_state(tmp_path / "state", trainer)
    assert digest(trainer) == before
    assert (trainer.weight_version, trainer.optimizer.steps, trainer.num_accumulated) == (1, 1, 0)
    assert all((g == 0).all() for g in gradients(trainer))


def test_large_states_are_cut_into_files(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.pieces.FILE_BYTES", 100_000)
    first, second = make_trainer(), make_trainer()
    train_step(first, 0)
    save_state(tmp_path / "state", first)
    assert len(list((tmp_path / "state").glob("state-*.safetensors"))) > 3
    load_state(tmp_path / "state", second)
    assert digest(second) == digest(first)


def saved(tmp_path):
    trainer = make_trainer()
    train_step(trainer, 0)
    save_state(tmp_path / "state", trainer)
    return tmp_path / "state"


def truncate(path):
    file = next(path.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 100)


def edit_header(path, **changes):
    header = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(header | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "is truncated"),
        (lambda path: next(path.glob("*.safetensors")).unlink(), "cannot be read"),
        (lambda path: (path / "state.json").unlink(), "no saved state"),
        (lambda path: (path / "state.json").write_text("{"), "damaged"),
        (lambda path: edit_header(path, format=1), "format 1; this engine reads format 3"),
        (lambda path: edit_header(path, format=99), "format 99"),
        (lambda path: edit_header(path, dtype="bfloat16"), "EngineConfig.dtype"),
        (lambda path: edit_header(path, files=[]), "not complete"),
    ],
)
def test_a_damaged_state_is_refused_before_a_weight_is_touched(tmp_path, damage, message):
    path = saved(tmp_path)
    damage(path)
    trainer = make_trainer()
    train_step(trainer, 5)
    before = digest(trainer)
    with pytest.raises(CheckpointError, match=message):
        load_state(path, trainer)
    assert digest(trainer) == before
    train_step(trainer, 6)


def test_the_state_of_another_model_is_refused(tmp_path):
    from engine.config import EngineConfig
    from engine.model import Transformer
    from engine.trainer import Trainer
    from tests.tiny import tiny_config

    path = saved(tmp_path)
    for change in ({"num_hidden_layers": 1}, {"intermediate_size": 64}):
        other = Trainer(Transformer(tiny_config(**change), torch.float32), EngineConfig(dtype="float32"))
        with pytest.raises(CheckpointError, match="the model"):
            load_state(path, other)


def test_extra_that_is_not_json_is_refused_and_leaves_the_old_state(tmp_path):
    path = saved(tmp_path)
    with pytest.raises(InputError, match="JSON"):
        save_state(path, make_trainer(), {"when": object()})
    load_state(path, make_trainer())


def test_a_step_broken_off_half_way_is_not_saved(tmp_path):
    trainer = make_trainer()
    trainer.optimizer.interrupted = True
    with pytest.raises(CheckpointError, match="interrupted"):
        save_state(tmp_path / "state", trainer)
    assert not (tmp_path / "state").exists()


CHILD = """
import sys
from pathlib import Path
from engine.state import load_state, save_state
from tests.engine.test_state import STEPS, digest, train_step
from tests.engine.test_trainer import make_trainer

path = Path(sys.argv[1])
trainer = make_trainer("bfloat16")
start = 0
if "--resume" in sys.argv:
    start = load_state(path, trainer)["step"]
print("start", start, flush=True)
for step in range(start, STEPS):
    train_step(trainer, step)
    save_state(path, trainer, {"step": step + 1})
    print("saved", step + 1, flush=True)
print("end", digest(trainer), flush=True)
"""


def test_a_run_killed_at_random_moments_ends_with_the_bits_of_one_never_killed(tmp_path):
    whole = make_trainer("bfloat16")
    for step in range(STEPS):
        train_step(whole, step)
    moments, starts, end = random.Random(0), [], None
    for kill in (True, True, False):
        arguments = [sys.executable, "-c", CHILD, str(tmp_path / "state"), *(["--resume"] if starts else [])]
        child = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        with child:
            assert child.stdout is not None
            saves, after = 0, moments.randint(2, 4)
            for line in child.stdout:
                word, value = line.split()
                if word == "start":
                    starts.append(int(value))
                if word == "end":
                    end = value
                saves += word == "saved"
                if kill and saves == after:
                    time.sleep(moments.uniform(0.0, 0.05))  # somewhere in the next step or the save after it
                    os.kill(child.pid, signal.SIGKILL)
                    break
        assert child.returncode == (-signal.SIGKILL if kill else 0)
    assert starts[0] == 0 and all(later > earlier for earlier, later in itertools.pairwise(starts))
    assert end == digest(whole)
