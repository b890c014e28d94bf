"""Saves in the background, on one rank: the state of the moment, at most one at a time, no failure lost."""

import errno
import os
import threading
from unittest import mock

import pytest
import torch

from engine.errors import CheckpointError, EngineError, InputError
from engine.pieces import write_pieces
from engine.saver import StateSaver
from engine.state import load_state
from tests.engine.test_state import digest, train_step
from tests.engine.test_trainer import make_samples, make_trainer


class Gate:
    """Stands in for the disk: writing begins when it is opened."""

    def __init__(self):
        self.open = threading.Event()
        self.writes = 0

    def __call__(self, *arguments):
        assert self.open.wait(30.0)
        self.writes += 1
        return write_pieces(*arguments)


@pytest.fixture
def gate():
    gate = Gate()
    with mock.patch("engine.state.write_pieces", gate):
        yield gate
        gate.open.set()


def test_the_state_of_the_moment_is_saved_while_training_goes_on(tmp_path, gate):
    trainer = make_trainer("bfloat16")
    train_step(trainer, 0)
    trainer.forward_backward(make_samples(3), "sft")
    before, gradient = digest(trainer), trainer.model.weights()[0].grad_buffer().clone()
    saver = StateSaver(trainer)
    saver.save(tmp_path / "state", {"step": 1}, wait=False)
    trainer.optim_step(1e-3)
    train_step(trainer, 1)
    assert digest(trainer) != before and not (tmp_path / "state").exists()
    gate.open.set()
    saver.close()
    restored = make_trainer("bfloat16")
    assert load_state(tmp_path / "state", restored) == {"step": 1}
    assert digest(restored) == before and restored.num_accumulated == 1
    assert torch.equal(restored.model.weights()[0].grad_buffer(), gradient)


def test_the_next_save_waits_for_the_one_under_way(tmp_path, gate):
    trainer = make_trainer()
    saver = StateSaver(trainer)
    saver.save(tmp_path / "state", {"step": 0}, wait=False)
    opener = threading.Timer(0.2, gate.open.set)
    opener.start()
    saver.save(tmp_path / "state", {"step": 1})
    assert gate.writes == 2
    assert load_state(tmp_path / "state", trainer) == {"step": 1}
    assert os.listdir(tmp_path) == ["state"]


def test_a_failure_is_raised_once_by_the_next_call_and_leaves_the_old_state(tmp_path, caplog):
    trainer = make_trainer()
    saver = StateSaver(trainer)
    saver.save(tmp_path / "state", {"step": 0})
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch("engine.state.write_pieces", side_effect=full):
        saver.save(tmp_path / "state", {"step": 1}, wait=False)
        with pytest.raises(CheckpointError, match="free some space"):
            saver.save(tmp_path / "state", {"step": 2})
    assert "free some space" in caplog.text, "it is logged when it happens"
    assert load_state(tmp_path / "state", trainer) == {"step": 0}
    saver.save(tmp_path / "state", {"step": 3}, wait=False)
    saver.close()
    assert load_state(tmp_path / "state", trainer) == {"step": 3}


def test_an_unexpected_failure_is_not_lost_either(tmp_path):
    saver = StateSaver(make_trainer())
    with mock.patch("engine.state.write_pieces", side_effect=ZeroDivisionError("odd")):
        saver.save(tmp_path / "state", wait=False)
        with pytest.raises(EngineError, match="ZeroDivisionError"):
            saver.wait()
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_saved_is_refused_at_once(tmp_path):
    saver = StateSaver(make_trainer())
    with pytest.raises(InputError, match="JSON"):
        saver.save(tmp_path / "state", {"when": object()}, wait=False)
    saver.close()
    assert os.listdir(tmp_path) == []
