"""Which rank holds what: arithmetic on sizes, no processes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import ParallelConfig
from engine.errors import ConfigError
from engine.model import Transformer
from engine.parallel.mesh import Mesh
from engine.parallel.shards import Placement, head_shard, layer_chunks, row_shard
from engine.parts import tensor_shapes
from tests.tiny import FAMILIES, tiny_config


def models(architecture: str, chunks: int = 1, **axes: int) -> list[Transformer]:
    """One replica's models, each as its rank has it."""
    config = tiny_config(architecture, num_hidden_layers=4)
    parallel = ParallelConfig(dp=1, **axes)
    world = parallel.pp * parallel.tp
    meshes = [Mesh.layout(parallel, world, rank) for rank in range(world)]
    return [Transformer(config, torch.float32, Placement(mesh, chunks, True)) for mesh in meshes]


@given(rows=st.integers(1, 5000), shards=st.integers(1, 9))
def test_row_shards_partition_the_rows_on_panel_boundaries(rows: int, shards: int) -> None:
    if -(-rows // 16) < shards:
        with pytest.raises(ConfigError, match="leave nothing"):
            [row_shard(rows, shards, index) for index in range(shards)]
        return
    spans = [row_shard(rows, shards, index) for index in range(shards)]
    assert spans[0].first == 0 and spans[-1].end == rows
    assert all(a.end == b.first and b.first % 16 == 0 for a, b in itertools.pairwise(spans))
    assert max(s.size for s in spans) - min(s.size for s in spans) <= 31


@given(layers=st.integers(1, 130), stages=st.integers(1, 16), chunks=st.integers(1, 4))
def test_layers_are_dealt_once_and_evenly(layers: int, stages: int, chunks: int) -> None:
    if layers < stages * chunks:
        with pytest.raises(ConfigError, match="cannot be dealt"):
            layer_chunks(layers, stages, chunks, 0)
        return
    ranges = [layer_chunks(layers, stages, chunks, stage) for stage in range(stages)]
    in_order = [ranges[virtual % stages][virtual // stages] for virtual in range(stages * chunks)]
    assert [layer for part in in_order for layer in part] == list(range(layers))
    assert max(map(len, in_order)) - min(map(len, in_order)) <= 1


@pytest.mark.parametrize(("heads", "kv_heads", "shards"), [(8, 2, 1), (8, 2, 2), (8, 2, 4), (8, 2, 8), (4, 4, 4)])
def test_each_query_head_is_with_the_key_head_it_reads(heads: int, kv_heads: int, shards: int) -> None:
    config = tiny_config(num_attention_heads=heads, num_key_value_heads=kv_heads)
    owned = []
    for index in range(shards):
        shard = head_shard(config, shards, index)
        for head in range(shard.heads.first, shard.heads.end):
            reads = head * kv_heads // heads
            here = (head - shard.heads.first) * shard.kv_heads.size // shard.heads.size + shard.kv_heads.first
            assert here == reads
        owned += list(range(shard.kv_heads.first, shard.kv_heads.end)) if shard.owned else []
    assert owned == list(range(kv_heads))


def test_heads_that_cannot_be_dealt_are_refused() -> None:
    with pytest.raises(ConfigError, match="tp is 3, but the model has 4 attention heads and 2 key/value heads"):
        head_shard(tiny_config(), 3, 0)


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize(("axes", "chunks"), [({}, 1), ({"tp": 2}, 1), ({"tp": 4}, 1), ({"tp": 2, "pp": 2}, 2)])
def test_owned_regions_are_every_tensor_exactly_once(architecture: str, axes: dict[str, int], chunks: int) -> None:
    ranks = models(architecture, chunks, **axes)
    held = {name: np.zeros(shape, dtype=np.int8) for name, shape in tensor_shapes(ranks[0].config).items()}
    for model in ranks:
        for part in model.parts():
            assert part.whole == held[part.name].shape
            if part.owned:
                held[part.name][part.region] += 1
    assert all((count == 1).all() for count in held.values())


def test_parts_of_one_rank_are_the_checkpoint_in_its_order() -> None:
    for architecture in FAMILIES:
        (model,) = models(architecture)
        assert [(p.name, p.shape) for p in model.parts()] == list(tensor_shapes(model.config).items())


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_every_mesh_begins_with_the_same_model(seed: int) -> None:
    (whole,) = models("Qwen3ForCausalLM")
    whole.initialize(seed)
    reference = {part.name: part.weight.dense(part.row, part.shape[0]) for part in whole.parts()}
    for model in models("Qwen3ForCausalLM", tp=4) + models("Qwen3ForCausalLM", tp=2, pp=2):
        model.initialize(seed)
        for part in model.parts():
            held = part.weight.dense(part.row, part.shape[0])
            assert torch.equal(held, reference[part.name][part.region]), part.name
