"""Hugging Face directories of meshes: each rank reads its own regions, one writes the bytes that a single rank would,
and what fails on one rank is raised on all."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engine import Engine, EngineConfig
from engine.checkpoint import load_weights, save_pretrained
from engine.config import ParallelConfig
from engine.errors import CheckpointError, ParallelError
from engine.parallel.mesh import Mesh, make_mesh
from engine.parallel.together import together
from tests.parallel.pool import Pool
from tests.tiny import save_tiny_tokenizer, tiny_config

MESHES = [
    {"tp": 2, "pp": 2},
    {"tp": 4},
    {"pp": 2, "dp": 2},
    {"pp": 2, "tp": 2, "schedule": "interleaved"},
    {"cp": 2, "tp": 2},
]


def engine_of(parallel: dict[str, Any], seed: int = 0, single: bool = False, **model: Any) -> Engine:
    config = EngineConfig(dtype="bfloat16", threads=1, parallel=ParallelConfig(**parallel))
    sizes = {"num_hidden_layers": 4} | model
    mesh = Mesh.single() if single else None
    return Engine.from_config(tiny_config("Qwen2ForCausalLM", **sizes), config, seed=seed, mesh=mesh)


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in sorted(os.listdir(directory))}


def save(directory: Path, parallel: dict[str, Any], tied: bool, block_bytes: int, max_shard_bytes: int) -> None:
    engine = engine_of(parallel, tie_word_embeddings=tied)
    with mock.patch("engine.gather.BLOCK_BYTES", block_bytes):
        save_pretrained(directory, engine.model, max_shard_bytes=max_shard_bytes)
    assert (directory / "config.json").exists(), "a rank went on before the checkpoint was there"
    engine.close()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("parallel", MESHES, ids=str)
def test_a_mesh_writes_the_bytes_of_a_single_rank(tmp_path: Path, pool4: Pool, parallel: Any, tied: bool) -> None:
    single = engine_of({}, single=True, tie_word_embeddings=tied)
    save_pretrained(tmp_path / "single", single.model, max_shard_bytes=50_000)
    pool4.run(save, tmp_path / "mesh", parallel, tied, 3000, 50_000)
    ours, theirs = bytes_of(tmp_path / "mesh"), bytes_of(tmp_path / "single")
    assert ours.keys() == theirs.keys() and len(ours) > 4
    assert [name for name in ours if ours[name] != theirs[name]] == []


class Counting:
    """safe_open that counts the elements that are asked for."""

    elements = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.file = safe_open(*arguments, **options)

    def __enter__(self) -> Counting:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def get_slice(self, name: str) -> Counting:
        self.slice = self.file.get_slice(name)
        return self

    def __getitem__(self, index: Any) -> torch.Tensor:
        value = self.slice[index]
        Counting.elements += value.numel()
        return value


def load(directory: Path, parallel: dict[str, Any]) -> tuple[list[str], int, int]:
    """Parts that do not hold what the file has in their region; elements read; elements of all parts."""
    Counting.elements = 0
    engine = engine_of(parallel, seed=1)
    with mock.patch("engine.checkpoint.safe_open", Counting):
        load_weights(directory, engine.model)
    whole = load_file(directory / "model.safetensors")
    wrong = []
    for part in engine.model.parts():
        if not torch.equal(part.weight.dense(part.row, part.shape[0]), whole[part.name][part.region]):
            wrong.append(part.name)
    engine.close()
    return wrong, Counting.elements, sum(torch.Size(part.shape).numel() for part in engine.model.parts())


@pytest.mark.parametrize("parallel", MESHES, ids=str)
def test_each_rank_reads_its_regions_and_nothing_else(tmp_path: Path, pool4: Pool, parallel: dict[str, Any]) -> None:
    single = engine_of({}, single=True)
    single.save_pretrained(tmp_path / "model")
    total = sum(tensor.numel() for tensor in load_file(tmp_path / "model" / "model.safetensors").values())
    for wrong, read, held in pool4.run(load, tmp_path / "model", parallel):
        assert wrong == []
        assert read == held < total


def from_pretrained(directory: Path, parallel: dict[str, Any]) -> str:
    """The error it raises."""
    with pytest.raises((CheckpointError, ParallelError)) as caught:
        Engine.from_pretrained(directory, EngineConfig(threads=1, parallel=ParallelConfig(**parallel)))
    return f"{type(caught.value).__name__}: {caught.value}"


def damage(directory: Path, change: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


LAST = "model.layers.3.mlp.down_proj.weight"


def test_tensors_that_only_one_stage_holds_are_missed_on_all_ranks(tmp_path: Path, pool4: Pool) -> None:
    engine_of({}, single=True).save_pretrained(tmp_path)
    damage(tmp_path, lambda tensors: tensors.pop(LAST))
    errors = pool4.run(from_pretrained, tmp_path, {"pp": 4})
    assert len(set(errors)) == 1 and f"lacks {LAST}" in errors[0]


def test_nan_that_only_one_rank_reads_is_raised_on_all_with_its_place_in_the_tensor(
    tmp_path: Path, pool4: Pool
) -> None:
    engine_of({}, single=True).save_pretrained(tmp_path)
    damage(tmp_path, lambda tensors: tensors[LAST][3].__setitem__(90, float("nan")))
    errors = pool4.run(from_pretrained, tmp_path, {"pp": 2, "tp": 2})
    assert len(set(errors)) == 1
    assert (
        "on rank 3: " in errors[0] and f"{LAST} holds NaN or infinity in 1 of" in errors[0] and "[3, 90]" in errors[0]
    )


def test_a_shape_that_does_not_match_is_refused_on_all_ranks(tmp_path: Path, pool2: Pool) -> None:
    engine_of({}, single=True).save_pretrained(tmp_path)
    damage(tmp_path, lambda tensors: tensors.update({LAST: torch.zeros(64, 48)}))
    errors = pool2.run(from_pretrained, tmp_path, {"tp": 2})
    assert errors[0] == errors[1] and "has shape (64, 48), expected (64, 96)" in errors[0]


def save_onto_a_full_disk(directory: Path) -> str:
    """The error; a limit on the size of files stands in for a full disk, on the rank that writes."""
    engine = engine_of({"tp": 2}, seed=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000 if engine.mesh.is_main else soft, hard))
    try:
        with pytest.raises(CheckpointError) as caught, mock.patch("engine.gather.BLOCK_BYTES", 1000):
            engine.save_pretrained(directory)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    engine.generate([[3, 4]])  # the ranks are still in step
    engine.close()
    return str(caught.value)


def test_a_disk_that_is_full_for_the_writer_is_an_error_on_all_and_leaves_the_old(tmp_path: Path, pool2: Pool) -> None:
    engine_of({}, single=True).save_pretrained(tmp_path / "model")
    before = bytes_of(tmp_path / "model")
    errors = pool2.run(save_onto_a_full_disk, tmp_path / "model")
    assert all("cannot write" in error and "What was there is intact" in error for error in errors)
    assert os.listdir(tmp_path) == ["model"] and bytes_of(tmp_path / "model") == before


def save_weights_that_diverged(directory: Path) -> str:
    engine = engine_of({"pp": 2})
    if engine.mesh.pp.index == 1:
        engine.model.norm.load_(torch.full((64,), torch.inf))
    with pytest.raises(CheckpointError) as caught:
        engine.save_pretrained(directory)
    engine.close()
    return str(caught.value)


def test_a_model_that_diverged_on_another_rank_does_not_replace_a_good_checkpoint(tmp_path: Path, pool2: Pool) -> None:
    engine_of({}, single=True).save_pretrained(tmp_path / "model")
    before = bytes_of(tmp_path / "model")
    errors = pool2.run(save_weights_that_diverged, tmp_path / "model")
    assert all("the model in memory: model.norm.weight holds NaN or infinity in 64 of 64" in error for error in errors)
    assert bytes_of(tmp_path / "model") == before


def export(directory: Path, source: Path) -> None:
    engine = Engine.from_pretrained(source, EngineConfig(threads=1, parallel=ParallelConfig(tp=2)))
    engine.save_pretrained(directory)
    engine.close()


def test_the_tokenizer_goes_through_a_mesh(tmp_path: Path, pool2: Pool) -> None:
    engine_of({}, single=True).save_pretrained(tmp_path / "in")
    save_tiny_tokenizer(tmp_path / "in")
    pool2.run(export, tmp_path / "out", tmp_path / "in")
    before, after = bytes_of(tmp_path / "in"), bytes_of(tmp_path / "out")
    assert before == after and "tokenizer.json" in after
    assert json.loads(after["config.json"])["architectures"] == ["Qwen2ForCausalLM"]


def fail_together(failing: dict[int, BaseException]) -> str:
    mesh = make_mesh(ParallelConfig())
    try:
        with together(mesh.world):
            if mesh.rank in failing:
                raise failing[mesh.rank]
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def test_one_rank_s_error_is_everyone_s(pool2: Pool) -> None:
    same = CheckpointError("lost")
    assert pool2.run(fail_together, {}) == ["none"] * 2
    assert pool2.run(fail_together, {0: same, 1: same}) == ["CheckpointError: lost"] * 2
    assert pool2.run(fail_together, {1: same}) == ["CheckpointError: on rank 1: lost"] * 2


def test_an_error_that_is_not_ours_keeps_its_type_where_it_happened(pool2: Pool) -> None:
    assert pool2.run(fail_together, {0: KeyError("x")}) == ["KeyError: 'x'", "ParallelError: on rank 0: KeyError: 'x'"]
