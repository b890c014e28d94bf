"""Training states of meshes: written by one arrangement of ranks, read by any other, whole at every moment."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock
from zlib import crc32

import pytest
import torch
from torch import Tensor

from engine import Engine, EngineConfig
from engine.config import ParallelConfig
from engine.errors import CheckpointError, ParallelError
from engine.parallel.mesh import Mesh
from engine.parts import Part
from engine.pieces import write_pieces
from engine.region import Region, whole
from engine.state import load_state, save_state
from engine.trainer import Trainer
from tests.engine.test_trainer import make_samples
from tests.parallel.pool import Pool, WorkerDied
from tests.parallel.test_checkpoints import Counting
from tests.tiny import tiny_config

KINDS = ("master", "exp_avg", "exp_avg_sq", "grad")


def engine_of(parallel: dict[str, Any] | None, dtype: str = "bfloat16", seed: int = 0, **model: Any) -> Engine:
    """On the mesh of all ranks, or by itself (None)."""
    config = EngineConfig(
        dtype=dtype, threads=1, kv_tokens=512, max_batch_tokens=64, parallel=ParallelConfig(**(parallel or {}))
    )
    mesh = Mesh.single() if parallel is None else None
    return Engine.from_config(tiny_config(**{"num_hidden_layers": 4} | model), config, seed=seed, mesh=mesh)


def whole_value(kind: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers that say which element of which tensor they are."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(crc32(f"{kind}/{name}".encode())))


def held_values(trainer: Trainer) -> list[tuple[Part, Region, dict[str, Tensor]]]:
    """The rows of every part that this rank steps: their region, and what the optimizer keeps of them, as views."""
    found = []
    for block, weight in trainer.optimizer.shares.own_rows():
        moments = trainer.optimizer.state[weight.name]
        kinds = {kind: getattr(moments, kind) for kind in KINDS[:3]} | {"grad": weight.grad_buffer()}
        for part in (part for part in trainer.model.parts() if part.weight is block.weight):
            first, end = max(block.row, part.row), min(block.row + block.rows, part.row + part.shape[0])
            if first < end:
                region = Region(part.origin, part.shape).rows(first - part.row, end - first)
                views = {kind: tensor[first - block.row : end - block.row] for kind, tensor in kinds.items()}
                found.append((part, region, views))
    return found


def fill(trainer: Trainer) -> None:
    trainer.optimizer.allocate()
    for part, region, views in held_values(trainer):
        for kind, view in views.items():
            view.copy_(whole_value(kind, part.name, part.whole)[region.within(whole(part.whole))])
    for part in trainer.model.parts():
        part.weight.load_(whole_value("master", part.name, part.whole)[part.region], row=part.row)
    trainer.optimizer.steps, trainer.weight_version, trainer.num_accumulated = 7, 5, 2


def write(directory: Path, parallel: dict[str, Any] | None, file_bytes: int = 100_000, **model: Any) -> None:
    engine = engine_of(parallel, **model)
    with mock.patch("engine.parallel.ownership.BLOCK_ELEMENTS", 2000):
        fill(engine.trainer)
    with mock.patch("engine.pieces.FILE_BYTES", file_bytes):
        engine.save_state(directory, {"step": 7})
    engine.close()


def read(directory: Path, parallel: dict[str, Any] | None, **model: Any) -> tuple[list[str], int, int]:
    """What is not as it was written; elements read; elements of this rank's weights and of the rows it steps."""
    engine = engine_of(parallel, seed=1, **model)
    Counting.elements = 0
    with mock.patch("engine.pieces.safe_open", Counting), mock.patch("engine.pieces.BLOCK_BYTES", 3000):
        assert engine.load_state(directory) == {"step": 7}
    trainer = engine.trainer
    wrong, kept = [], 0
    for part, region, views in held_values(trainer):
        kept += region.num_elements
        for kind, view in views.items():
            if not torch.equal(view, whole_value(kind, part.name, part.whole)[region.within(whole(part.whole))]):
                wrong.append(f"{kind}/{part.name}")
    for part in trainer.model.parts():
        expected = whole_value("master", part.name, part.whole)[part.region].to(part.weight.dtype)
        if not torch.equal(part.weight.dense(part.row, part.shape[0]), expected):
            wrong.append(part.name)
    counters = (trainer.optimizer.steps, trainer.weight_version, trainer.num_accumulated)
    assert counters == (7, 5, 2) and not trainer.optimizer.interrupted
    engine.close()
    held = sum(Region(part.origin, part.shape).num_elements for part in trainer.model.parts())
    return wrong, Counting.elements, held + len(KINDS) * kept


MESHES: list[dict[str, Any]] = [
    {"tp": 2, "dp": 2},
    {"tp": 4},
    {"pp": 2, "tp": 2},
    {"pp": 2, "dp": 2, "schedule": "interleaved"},
    {"dp": 4},
    {"cp": 2, "tp": 2},
]


@pytest.mark.parametrize("written", MESHES, ids=str)
def test_a_single_rank_reads_what_a_mesh_wrote(tmp_path: Path, pool4: Pool, written: dict[str, Any]) -> None:
    pool4.run(write, tmp_path / "state", written)
    assert len({path.name[:11] for path in (tmp_path / "state").glob("*.safetensors")}) > 1 or "dp" in written
    assert read(tmp_path / "state", None)[0] == []


@pytest.mark.parametrize("reader", MESHES, ids=str)
def test_a_mesh_reads_its_regions_of_what_another_wrote(tmp_path: Path, pool4: Pool, reader: dict[str, Any]) -> None:
    pool4.run(write, tmp_path / "state", {"tp": 2, "pp": 2})
    for wrong, elements, held in pool4.run(read, tmp_path / "state", reader):
        assert wrong == []
        assert elements == held


@pytest.mark.parametrize("tied", [False, True])
def test_two_ranks_read_what_four_wrote(tmp_path: Path, pool2: Pool, pool4: Pool, tied: bool) -> None:
    pool4.run(write, tmp_path / "state", {"pp": 2, "tp": 2}, tie_word_embeddings=tied)
    for reader in ({"pp": 2}, {"tp": 2}, {"dp": 2}):
        for wrong, _, _ in pool2.run(read, tmp_path / "state", reader, tie_word_embeddings=tied):
            assert wrong == []


def test_every_element_is_written_once(tmp_path: Path, pool4: Pool) -> None:
    """Also those that several ranks hold: norms, and key/value heads with more ranks than heads."""
    pool4.run(write, tmp_path / "state", {"tp": 4})
    write(tmp_path / "single", None)
    sizes = [
        sum(path.stat().st_size for path in (tmp_path / name).glob("*.safetensors")) for name in ("state", "single")
    ]
    headers = 300 * 4 * 60 * 4  # a header names its pieces
    assert abs(sizes[0] - sizes[1]) < headers < sizes[1] // 2


def train(engine: Engine, steps: range) -> list[float]:
    losses = []
    for step in steps:
        losses.append(engine.forward_backward(make_samples(4, seed=step), "sft").loss)
        engine.optim_step(1e-2)
    return losses


def damaged_load(directory: Path, parallel: dict[str, Any]) -> str:
    engine = engine_of(parallel)
    before = [weight.data.clone() for weight in engine.model.weights()]
    with pytest.raises(CheckpointError) as caught:
        engine.load_state(directory)
    assert all(torch.equal(a, w.data) for a, w in zip(before, engine.model.weights(), strict=True))
    train(engine, range(1))  # nothing was touched: it can be used
    engine.close()
    return str(caught.value)


def unlist(directory: Path, rank: int) -> None:
    header = json.loads((directory / "state.json").read_text())
    header["files"] = [name for name in header["files"] if not name.startswith(f"state-{rank:05d}")]
    (directory / "state.json").write_text(json.dumps(header))


def write_twice(directory: Path, rank: int) -> None:
    header = json.loads((directory / "state.json").read_text())
    header["files"] += [name for name in header["files"] if name.startswith(f"state-{rank:05d}")]
    (directory / "state.json").write_text(json.dumps(header))


def cut_off(directory: Path, rank: int) -> None:
    file = max(directory.glob(f"state-{rank:05d}-*"))
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [(unlist, "0 times instead of once"), (write_twice, "2 times instead of once"), (cut_off, "is truncated")],
)
def test_a_damaged_file_of_one_rank_is_found_by_all_before_a_weight_is_touched(
    tmp_path: Path, pool2: Pool, damage: Any, message: str
) -> None:
    pool2.run(write, tmp_path / "state", {"tp": 2})
    damage(tmp_path / "state", 1)
    errors = pool2.run(damaged_load, tmp_path / "state", {"tp": 2})
    assert message in errors[0] and message in errors[1]


def test_damage_that_one_stage_does_not_read_is_still_an_error_for_it(tmp_path: Path, pool2: Pool) -> None:
    pool2.run(write, tmp_path / "state", {"pp": 2})
    unlist(tmp_path / "state", 1)
    errors = pool2.run(damaged_load, tmp_path / "state", {"tp": 2})
    assert "is not complete" in errors[0] and errors[0] == errors[1]


def fail_in_the_background(directory: Path, call: str) -> str:
    """The error that comes with the next call, on every rank."""
    engine = engine_of({"tp": 2}, "float32")
    engine.save_state(directory, {"step": 0})

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with mock.patch("engine.state.write_pieces", refuse if engine.mesh.rank == 1 else write_pieces):
        engine.save_state(directory, {"step": 1}, wait=False)
        train(engine, range(1))
        calls = {
            "save": lambda: engine.save_state(directory),
            "load": lambda: engine.load_state(directory),
            "wait": engine.wait_for_saves,
            "export": lambda: engine.save_pretrained(directory / "out"),
            "close": engine.close,
        }
        with pytest.raises(CheckpointError) as caught:
            calls[call]()
    if call != "close":
        assert engine.load_state(directory) == {"step": 0}
        engine.close()
    return str(caught.value)


@pytest.mark.parametrize("call", ["save", "load", "wait", "export", "close"])
def test_a_save_that_fails_in_the_background_is_raised_on_all_ranks_by_the_next_call(
    tmp_path: Path, pool2: Pool, call: str
) -> None:
    errors = pool2.run(fail_in_the_background, tmp_path / "state", call)
    assert all("on rank 1: cannot write" in error and "No space left" in error for error in errors)
    assert os.listdir(tmp_path) == ["state"]


def save_and_die(directory: Path, background: bool, where: str, victim: int) -> None:
    """One rank is killed while the ranks are in the middle of a save."""
    engine = engine_of({"tp": 2}, "float32", seed=3)
    fill(engine.trainer)

    def die(*_: Any) -> None:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch(where, die) if engine.mesh.rank == victim else nullcontext():
        engine.save_state(directory, wait=not background)
        engine.wait_for_saves()


@pytest.mark.parametrize(
    ("where", "victim", "background"),
    [
        ("engine.state.write_pieces", 1, False),
        ("engine.pieces.raw_bytes", 1, True),
        ("engine.pieces.raw_bytes", 0, False),
        ("engine.atomic.os.rename", 0, True),
    ],
)
def test_a_rank_killed_in_the_middle_of_a_save_leaves_the_last_complete_state(
    tmp_path: Path, pool2: Pool, where: str, victim: int, background: bool
) -> None:
    pool2.run(write, tmp_path / "state", {"tp": 2})
    with pytest.raises((WorkerDied, ParallelError)) as caught:
        pool2.run(save_and_die, tmp_path / "state", background, where, victim)
    assert f"rank {victim} died" in str(caught.value) + "".join(getattr(caught.value, "__notes__", []))
    for wrong, _, _ in pool2.run(read, tmp_path / "state", {"tp": 2}):
        assert wrong == []
    pool2.run(write, tmp_path / "state", {"pp": 2})
    assert os.listdir(tmp_path) == ["state"], "what the killed ranks left was cleaned up"


def save_elsewhere(directory: Path) -> str:
    engine = engine_of({"tp": 2})
    with pytest.raises(Exception) as caught:
        engine.save_state(directory / str(engine.mesh.rank))
    engine.close()
    return f"{type(caught.value).__name__}: {caught.value}"


def test_ranks_that_name_different_directories_are_told(tmp_path: Path, pool2: Pool) -> None:
    errors = pool2.run(save_elsewhere, tmp_path)
    assert all(
        error.startswith("ParallelError: save_state was called with other arguments on rank 1") for error in errors
    )
    assert os.listdir(tmp_path) == []


def save_without_extra(directory: Path) -> None:
    engine = engine_of({"dp": 2})
    save_state(directory, engine.trainer)
    assert load_state(directory, engine.trainer) == {}
    engine.close()


def test_a_state_before_the_first_step_is_of_masters_alone(tmp_path: Path, pool2: Pool) -> None:
    pool2.run(save_without_extra, tmp_path / "state")
    single = engine_of(None, seed=1)
    single.load_state(tmp_path / "state")
    fresh = engine_of(None, seed=0)
    assert all(torch.equal(a.data, b.data) for a, b in zip(single.model.weights(), fresh.model.weights(), strict=True))
    assert not single.trainer.optimizer.state
