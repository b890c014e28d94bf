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

STEPS, SAVED = 6, 3


def train_and_save(directory: Path, parallel: dict[str, Any] | None, dtype: str) -> list[float]:
    """The losses of a run that saves its state on the way."""
    engine = engine_of(parallel, dtype)
    losses = train(engine, range(SAVED))
    engine.save_state(directory, {"step": SAVED})
    losses += train(engine, range(SAVED, STEPS))
    engine.close()
    return losses


def resume(directory: Path, parallel: dict[str, Any] | None, dtype: str) -> list[float]:
    """The losses of a run that begins from a saved state."""
    engine = engine_of(parallel, dtype, seed=1)
    losses = train(engine, range(engine.load_state(directory)["step"], STEPS))
    engine.close()
    return losses


def run(pools: dict[int, Pool], function: Any, directory: Path, parallel: dict[str, Any] | None, dtype: str) -> Any:
    """On as many ranks as the mesh has; every rank sees the same losses."""
    if parallel is None:
        return function(directory, None, dtype)
    size = 1
    for axis in ("dp", "pp", "cp", "tp"):
        size *= parallel.get(axis, 1)
    results = pools[size].run(function, directory, parallel, dtype)
    assert all(result == results[0] for result in results)
    return results[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("parallel", [{"tp": 2}, {"dp": 2}, {"pp": 2}, {"cp": 2}, {"tp": 2, "dp": 2}], ids=str)
def test_on_the_same_mesh_losses_are_the_same_bits(
    tmp_path: Path, pool2: Pool, pool4: Pool, parallel: dict[str, Any], dtype: str
) -> None:
    pools = {2: pool2, 4: pool4}
    whole = run(pools, train_and_save, tmp_path / "state", parallel, dtype)
    assert run(pools, resume, tmp_path / "state", parallel, dtype) == whole[SAVED:]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"dp": 2}, None),
        ({"dp": 4}, {"dp": 2}),
        ({"tp": 2, "dp": 2}, {"tp": 2}),
        ({"dp": 2, "gradient_lanes": 4}, {"dp": 4}),
        ({"pp": 2, "dp": 2, "micro_batches": 2}, {"dp": 2, "micro_batches": 2}),
        ({"dp": 2, "micro_batches": 2}, {"pp": 2, "micro_batches": 2}),
    ],
    ids=str,
)
def test_with_other_replicas_or_stages_losses_are_the_same_bits(
    tmp_path: Path, pool2: Pool, pool4: Pool, before: dict[str, Any], after: dict[str, Any] | None
) -> None:
    """The state says in how many lanes gradients are summed, so the number of replicas does not matter; stages of a
    pipeline change no bit."""
    pools = {2: pool2, 4: pool4}
    whole = run(pools, train_and_save, tmp_path / "state", before, "bfloat16")
    assert run(pools, resume, tmp_path / "state", after, "bfloat16") == whole[SAVED:]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"tp": 2, "dp": 2}, {"tp": 4}),
        ({"tp": 4}, None),
        ({"tp": 2}, {"dp": 2}),
        (None, {"tp": 2, "dp": 2}),
        ({"tp": 2, "pp": 2}, {"cp": 2}),
        ({"cp": 2}, {"tp": 2, "pp": 2}),
    ],
    ids=str,
)
def test_with_other_tensor_or_context_parallel_ranks_losses_are_close(
    tmp_path: Path, pool2: Pool, pool4: Pool, before: dict[str, Any] | None, after: dict[str, Any] | None
) -> None:
    pools = {2: pool2, 4: pool4}
    whole = run(pools, train_and_save, tmp_path / "state", before, "float32")
    assert run(pools, resume, tmp_path / "state", after, "float32") == pytest.approx(whole[SAVED:], rel=1e-5)


def save_while_training(directory: Path) -> tuple[list[float], bool]:
    """The losses after a save in the background, and whether training went on before it was written."""
    engine = engine_of({"tp": 2}, "float32")
    train(engine, range(SAVED))
    gate = threading.Event()

    def slowly(*arguments: Any) -> list[str]:
        assert gate.wait(30.0)
        return write_pieces(*arguments)

    with mock.patch("engine.state.write_pieces", slowly):
        engine.save_state(directory, {"step": SAVED}, wait=False)
        losses = train(engine, range(SAVED, STEPS))
        early = not directory.exists()
        gate.set()
        engine.wait_for_saves()
    assert (directory / "state.json").exists()
    engine.close()
    return losses, early


def test_a_save_in_the_background_is_of_the_moment_it_was_asked_for(tmp_path: Path, pool2: Pool) -> None:
    results = pool2.run(save_while_training, tmp_path / "state")
    assert all(early for _, early in results)
    again = pool2.run(resume, tmp_path / "state", {"tp": 2}, "float32")
    assert again == [losses for losses, _ in results]
