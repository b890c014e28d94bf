"""Ranks and their devices: all on the CPU, or each on a GPU of its own."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from engine import Engine, EngineConfig
from engine.config import ParallelConfig
from engine.errors import ConfigError
from engine.parallel.mesh import make_mesh
from tests.parallel.pool import Pool
from tests.tiny import tiny_config


def refused(kinds: list[str]) -> str:
    """What an engine says that finds rank i on a device of kinds[i]."""
    parallel = ParallelConfig(dp=2)
    mesh = make_mesh(parallel)
    device = torch.device(kinds[mesh.rank])
    with patch("engine.engine.choose_device", lambda *_: device), pytest.raises(ConfigError) as caught:
        Engine.from_config(tiny_config(), EngineConfig(dtype="float32", parallel=parallel), mesh=mesh)
    mesh.close()
    return str(caught.value)


def test_ranks_on_devices_of_different_kinds_are_refused(pool2: Pool) -> None:
    first, second = pool2.run(refused, ["cpu", "meta"])
    assert "rank 0 on cpu, rank 1 on meta" in first
    assert first == second


def test_gpus_of_ranks_that_are_connected_without_nccl_are_refused(pool2: Pool) -> None:
    first, second = pool2.run(refused, ["cuda", "cuda"])
    assert "without NCCL" in first
    assert first == second
