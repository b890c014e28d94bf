"""Who talks to whom: the grid of ranks as arithmetic, and real groups on two and four ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import ParallelConfig
from engine.errors import ConfigError, ParallelError
from engine.parallel.collectives import all_gather_object
from engine.parallel.mesh import AXES, Mesh, grid_shape, make_mesh
from tests.parallel.pool import Pool

GROUPS = (*AXES, "replica", "data", "world")
sizes = st.integers(1, 3)
grids = st.builds(ParallelConfig, dp=sizes, pp=sizes, cp=sizes, tp=sizes)


def world_size(config: ParallelConfig) -> int:
    return config.dp * config.pp * config.cp * config.tp


def meshes(config: ParallelConfig) -> list[Mesh]:
    size = world_size(config)
    return [Mesh.layout(config, size, rank) for rank in range(size)]


def places(mesh: Mesh) -> tuple[int, ...]:
    return tuple(getattr(mesh, axis).index for axis in AXES)


@settings(max_examples=15, deadline=None)
@given(grids)
def test_ranks_are_numbered_row_major(config: ParallelConfig) -> None:
    for rank, mesh in enumerate(meshes(config)):
        dp, pp, cp, tp = places(mesh)
        assert rank == mesh.rank == ((dp * config.pp + pp) * config.cp + cp) * config.tp + tp
        assert mesh.shape == {axis: getattr(config, axis) for axis in AXES}


@settings(max_examples=15, deadline=None)
@given(grids)
def test_every_group_divides_the_world(config: ParallelConfig) -> None:
    all_meshes = meshes(config)
    for name in GROUPS:
        groups = {getattr(mesh, name).ranks for mesh in all_meshes}
        assert sorted(rank for ranks in groups for rank in ranks) == list(range(len(all_meshes)))
        for rank, mesh in enumerate(all_meshes):
            group = getattr(mesh, name)
            assert group.name == name and group.ranks[group.index] == rank
            assert list(group.ranks) == sorted(group.ranks)


@settings(max_examples=15, deadline=None)
@given(grids)
def test_ranks_of_a_group_differ_along_its_axes_only(config: ParallelConfig) -> None:
    spans = {**{axis: {axis} for axis in AXES}, "replica": {"pp", "cp", "tp"}, "data": {"dp", "cp"}}
    all_meshes = meshes(config)
    for mesh in all_meshes:
        for name, span in spans.items():
            held = [(places(mesh)[i], i) for i, axis in enumerate(AXES) if axis not in span]
            expected = [m.rank for m in all_meshes if all(places(m)[i] == value for value, i in held)]
            assert list(getattr(mesh, name).ranks) == expected


def test_tensor_parallel_ranks_are_neighbours() -> None:
    mesh = Mesh.layout(ParallelConfig(dp=2, pp=2, tp=2), 8, 5)
    assert mesh.tp.ranks == (4, 5) and mesh.pp.ranks == (5, 7) and mesh.dp.ranks == (1, 5)
    assert mesh.replica.ranks == (4, 5, 6, 7) and mesh.data.ranks == (1, 5)
    assert str(mesh) == "dp 2 x pp 2 x cp 1 x tp 2"


def test_one_process_is_a_mesh_of_one() -> None:
    mesh = make_mesh(ParallelConfig())
    assert mesh == Mesh.single() and mesh.is_main and all(getattr(mesh, name).size == 1 for name in GROUPS)
    mesh.agree("nothing", 1)
    mesh.close()


@settings(max_examples=15, deadline=None)
@given(sizes, sizes, sizes, st.integers(1, 8))
def test_dp_0_takes_the_ranks_that_are_there(pp: int, cp: int, tp: int, dp: int) -> None:
    assert grid_shape(ParallelConfig(pp=pp, cp=cp, tp=tp), dp * pp * cp * tp)["dp"] == dp


@pytest.mark.parametrize(
    ("config", "size", "start"),
    [
        (ParallelConfig(dp=3), 4, "start 3"),
        (ParallelConfig(tp=2), 1, "start 2"),
        (ParallelConfig(tp=2), 5, "start 4"),
        (ParallelConfig(dp=1, pp=2), 4, "start 2"),
    ],
)
def test_grid_that_does_not_fit_is_refused_with_the_number_that_does(
    config: ParallelConfig, size: int, start: str
) -> None:
    with pytest.raises(ConfigError, match=rf"does not make {size} ranks.*{start} \(torchrun"):
        Mesh.layout(config, size, 0)


def test_mesh_that_needs_more_ranks_than_this_process_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not make 1 ranks"):
        make_mesh(ParallelConfig(tp=2))


# ---- on ranks ----


def gathered_ranks(config: ParallelConfig) -> dict[str, tuple[tuple[int, ...], list[int]]]:
    mesh = make_mesh(config)
    found = {name: (getattr(mesh, name).ranks, all_gather_object(mesh.rank, getattr(mesh, name))) for name in GROUPS}
    mesh.close()
    return found


def agree_on(prints: list[int]) -> None:
    mesh = make_mesh(ParallelConfig())
    mesh.agree("forward_backward", prints[mesh.rank])


def refused(config: ParallelConfig) -> None:
    make_mesh(config)


def shapes(total: int) -> Iterator[ParallelConfig]:
    for dp in range(1, total + 1):
        for pp in range(1, total + 1):
            for cp in range(1, total + 1):
                for tp in range(1, total + 1):
                    if dp * pp * cp * tp == total:
                        yield ParallelConfig(dp=dp, pp=pp, cp=cp, tp=tp)


@pytest.mark.parametrize("config", list(shapes(4)), ids=lambda c: f"{c.dp}{c.pp}{c.cp}{c.tp}")
def test_groups_connect_the_ranks_of_the_layout(pool4: Pool, config: ParallelConfig) -> None:
    for rank, found in enumerate(pool4.run(gathered_ranks, config)):
        layout = Mesh.layout(config, 4, rank)
        assert found == {name: (getattr(layout, name).ranks, list(getattr(layout, name).ranks)) for name in GROUPS}


def test_mesh_that_does_not_fit_is_refused_on_every_rank(pool2: Pool) -> None:
    with pytest.raises(ConfigError, match="start 4") as caught:
        pool2.run(refused, ParallelConfig(pp=2, tp=2))
    assert len(caught.value.__notes__) == 2


def test_agreement_on_the_same_call_is_silent(pool2: Pool) -> None:
    assert pool2.run(agree_on, [2**64 - 1, 2**64 - 1]) == [None, None]


def test_disagreement_names_call_and_ranks_on_every_rank(pool4: Pool) -> None:
    with pytest.raises(ParallelError, match="forward_backward was called with other arguments on ranks 1, 3 than") as e:
        pool4.run(agree_on, [7, 8, 7, 9])
    assert len(e.value.__notes__) == 4
