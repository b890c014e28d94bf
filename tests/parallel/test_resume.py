"""A run that goes on from a saved state, on the mesh that wrote it or another, is the run that was never stopped."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from engine.pieces import write_pieces
from tests.parallel.pool import Pool
from tests.parallel.test_states import engine_of, train


def train_and_save(directory: Path, parallel: dict[str, Any] | None, total: int, saved: int, dtype: str) -> list[float]:
    engine = engine_of(parallel, dtype)
    losses = train(engine, range(saved))
    engine.save_state(directory, {"step": saved})
    losses += train(engine, range(saved, total))
    engine.close()
    return losses


def resume(directory: Path, parallel: dict[str, Any] | None, total: int, dtype: str) -> list[float]:
    engine = engine_of(parallel, dtype, seed=1)
    losses = train(engine, range(engine.load_state(directory)["step"], total))
    engine.close()
    return losses


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_goes_on_with_the_same_losses_on_the_same_mesh(tmp_path: Path, pool2: Pool, dtype: str) -> None:
    whole = pool2.run(train_and_save, tmp_path / "state", {"tp": 2}, 6, 3, dtype)
    again = pool2.run(resume, tmp_path / "state", {"tp": 2}, 6, dtype)
    assert again == [losses[3:] for losses in whole]


@pytest.mark.parametrize(("before", "after"), [({"tp": 2}, {"tp": 4}), ({"tp": 4}, None)])
def test_training_goes_on_with_close_losses_on_another_mesh(
    tmp_path: Path, pool2: Pool, pool4: Pool, before: dict[str, Any], after: dict[str, Any] | None
) -> None:
    pools = {2: pool2, 4: pool4}
    (whole, *_) = pools[before["tp"]].run(train_and_save, tmp_path / "state", before, 6, 3, "float32")
    arguments = (tmp_path / "state", after, 6, "float32")
    again = resume(*arguments) if after is None else pools[after["tp"]].run(resume, *arguments)[0]
    assert again == pytest.approx(whole[3:], rel=1e-5)


def save_while_training(directory: Path, parallel: dict[str, Any]) -> tuple[list[float], bool]:
    """The losses after a save in the background, and whether training went on before it was written."""
    engine = engine_of(parallel, "float32")
    train(engine, range(2))
    gate = threading.Event()

    def slowly(*arguments: Any) -> list[str]:
        assert gate.wait(30.0)
        return write_pieces(*arguments)

    with mock.patch("engine.state.write_pieces", slowly):
        engine.save_state(directory, {"step": 2}, wait=False)
        losses = train(engine, range(2, 4))
        early = not directory.exists()
        gate.set()
        engine.wait_for_saves()
    assert (directory / "state.json").exists()
    engine.close()
    return losses, early


def test_a_save_in_the_background_is_of_the_moment_it_was_asked_for(tmp_path: Path, pool2: Pool) -> None:
    results = pool2.run(save_while_training, tmp_path / "state", {"tp": 2})
    assert all(early for _, early in results)
    again = pool2.run(resume, tmp_path / "state", {"tp": 2}, 4, "float32")
    assert again == [losses for losses, _ in results]
