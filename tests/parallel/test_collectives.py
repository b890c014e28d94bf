"""Each collective against what it means, written with indexing alone; sums against a fold in rank order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import ParallelConfig
from engine.errors import ParallelError
from engine.parallel import collectives as c
from engine.parallel.mesh import Mesh, make_mesh
from tests.parallel.pool import Pool

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.float64]
SMALL, BIG = 7, c.ONE_SHOT_BYTES  # elements: below and above what goes to every rank at once


def values(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What `rank` holds: any test can compute what any rank sent."""
    generator = torch.Generator().manual_seed(rank)
    if dtype == torch.int64:
        return torch.randint(-(2**40), 2**40, shape, generator=generator)
    return (torch.randn(shape, generator=generator) * 10.0 ** (3 * rank)).to(dtype)


def world() -> c.Group:
    return make_mesh(ParallelConfig()).world


def in_rank_order(parts: list[Tensor]) -> Tensor:
    wide = parts[0].dtype if parts[0].dtype in (torch.int64, torch.float64) else torch.float32
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
    return total


def equal(mine: Tensor, expected: Tensor) -> None:
    assert mine.dtype == expected.dtype and mine.shape == expected.shape, (mine.dtype, mine.shape, expected.shape)
    assert torch.equal(mine, expected), (mine - expected).abs().max()


def check_all_gather(dtype: torch.dtype) -> None:
    group = world()
    for shape in ((3, 5), (1,), (0, 4), ()):
        everyone = torch.stack([values(rank, shape, dtype) for rank in range(group.size)])
        equal(c.all_gather(values(group.index, shape, dtype), group), everyone)


def check_all_reduce(dtype: torch.dtype, elements: int) -> None:
    group = world()
    parts = [values(rank, (elements,), dtype) for rank in range(group.size)]
    equal(c.all_reduce(parts[group.index], group), in_rank_order(parts))


def check_reduce_scatter(dtype: torch.dtype) -> None:
    group = world()
    parts = [values(rank, (3 * group.size, 5), dtype) for rank in range(group.size)]
    expected = in_rank_order(parts)[3 * group.index : 3 * (group.index + 1)]
    equal(c.start_reduce_scatter(parts[group.index], group).wait(), expected)


def check_all_to_all(dtype: torch.dtype) -> None:
    group = world()
    blocks = [values(rank, (2 * group.size, 3), dtype) for rank in range(group.size)]
    expected = torch.cat([block[2 * group.index : 2 * (group.index + 1)] for block in blocks])
    equal(c.all_to_all(blocks[group.index], group), expected)


def check_uneven_all_to_all(dtype: torch.dtype, columns: tuple[int, ...]) -> None:
    """Rank i sends (i + 2 j) mod 3 rows to rank j: some nothing, some to none."""
    group = world()
    rows = [[(i + 2 * j) % 3 for j in range(group.size)] for i in range(group.size)]
    blocks = [values(rank, (sum(rows[rank]), *columns), dtype) for rank in range(group.size)]
    me = group.index
    received = c.all_to_all(blocks[me], group, send=rows[me], receive=[rows[i][me] for i in range(group.size)])
    parts = [block[(at := sum(rows[i][:me])) : at + rows[i][me]] for i, block in enumerate(blocks)]
    equal(received, torch.cat(parts))


def sum_where_order_matters(terms: list[float], elements: int) -> list[float]:
    group = world()
    x = torch.full((elements,), terms[group.index])
    return [c.all_reduce(x, group)[-1].item(), c.start_reduce_scatter(x, group).wait()[0].item()]


def check_broadcast(source: int) -> None:
    group = world()
    x = values(group.index, (4, 3), torch.bfloat16)
    assert c.broadcast(x, group, source) is x
    equal(x, values(source, (4, 3), torch.bfloat16))


def check_objects(source: int) -> None:
    group = world()
    mine = {"rank": group.index, "text": "x" * 1000 * group.index}
    everyone = c.all_gather_object(mine, group)
    assert [each["rank"] for each in everyone] == list(range(group.size))
    assert [len(each["text"]) for each in everyone] == [1000 * rank for rank in range(group.size)]
    assert c.broadcast_object(mine, group, source)["rank"] == source


def check_ring() -> None:
    """Everybody sends to the next and receives from the one before: no order of calls can deadlock."""
    group = world()
    x = values(group.index, (5, 2), torch.float32)
    before = (group.index - 1) % group.size
    sent = c.start_send(x, group, (group.index + 1) % group.size)
    got = c.start_receive((5, 2), torch.float32, group, before).wait()
    sent.wait()
    equal(got, values(before, (5, 2), torch.float32))


def check_many_under_way() -> None:
    group = world()
    tensors = [values(group.index, (n + 1,), torch.float32) for n in range(5)]
    pending = [c.start_all_gather(x, group) for x in tensors]
    for n in reversed(range(5)):
        equal(pending[n].wait(), torch.stack([values(rank, (n + 1,), torch.float32) for rank in range(group.size)]))


def mesh_groups_sum() -> dict[str, Any]:
    mesh = make_mesh(ParallelConfig(dp=2, tp=2))
    one = torch.tensor([10.0**mesh.rank])
    found = {name: c.all_reduce(one, getattr(mesh, name)).item() for name in ("dp", "tp", "world", "pp")}
    mesh.close()
    return found


def wait_for_one_that_does_not_come() -> str:
    mesh = make_mesh(ParallelConfig(tp=2, timeout_seconds=0.5))
    if mesh.rank == 1:
        return ""
    with pytest.raises(ParallelError) as caught:
        c.all_reduce(torch.ones(3), mesh.tp)
    return str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_gather_is_every_ranks_tensor_in_order(pool4: Pool, dtype: torch.dtype) -> None:
    pool4.run(check_all_gather, dtype)


@pytest.mark.parametrize("elements", [SMALL, BIG])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_reduce_is_the_fold_in_rank_order(pool4: Pool, dtype: torch.dtype, elements: int) -> None:
    pool4.run(check_all_reduce, dtype, elements)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reduce_scatter_is_a_block_of_the_fold_in_rank_order(pool4: Pool, dtype: torch.dtype) -> None:
    pool4.run(check_reduce_scatter, dtype)


@pytest.mark.parametrize("elements", [4, BIG])
@pytest.mark.parametrize(
    ("terms", "total"), [([1e8, 1.0, -1e8, 1.0], 1.0), ([1.0, 1e8, -1e8, 1.0], 1.0), ([1e8, -1e8, 1.0, 1.0], 2.0)]
)
def test_sum_is_taken_from_rank_0_up(pool4: Pool, terms: list[float], total: float, elements: int) -> None:
    assert pool4.run(sum_where_order_matters, terms, elements) == [[total, total]] * 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_to_all_deals_blocks(pool4: Pool, dtype: torch.dtype) -> None:
    pool4.run(check_all_to_all, dtype)


@pytest.mark.parametrize("columns", [(), (3,), (2, 3)], ids=str)
def test_all_to_all_deals_uneven_blocks(pool4: Pool, columns: tuple[int, ...]) -> None:
    pool4.run(check_uneven_all_to_all, torch.float32, columns)


@pytest.mark.parametrize("source", [0, 3])
def test_broadcast_is_the_sources_tensor_in_place(pool4: Pool, source: int) -> None:
    pool4.run(check_broadcast, source)


@pytest.mark.parametrize("source", [0, 2])
def test_objects_of_any_size_travel(pool4: Pool, source: int) -> None:
    pool4.run(check_objects, source)


def test_ring_of_sends_does_not_deadlock(pool4: Pool) -> None:
    pool4.run(check_ring)


def test_collectives_under_way_may_be_awaited_in_any_order(pool2: Pool) -> None:
    pool2.run(check_many_under_way)


def test_sum_is_over_the_group_alone(pool4: Pool) -> None:
    tp = [11.0, 11.0, 1100.0, 1100.0]
    dp = [101.0, 1010.0, 101.0, 1010.0]
    for rank, found in enumerate(pool4.run(mesh_groups_sum)):
        assert found == {"dp": dp[rank], "tp": tp[rank], "world": 1111.0, "pp": 10.0**rank}


def test_rank_that_does_not_come_is_an_error_that_names_operation_and_group(pool2: Pool) -> None:
    message = pool2.run(wait_for_one_that_does_not_come, timeout=20)[0]
    assert "all_reduce over the group tp (ranks 0, 1)" in message and "rank 0" in message


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_of_one_is_the_identity(dtype: torch.dtype) -> None:
    group = Mesh.single().tp
    x = values(0, (4, 3), dtype)
    for result in (c.all_reduce(x, group), c.start_reduce_scatter(x, group).wait(), c.all_to_all(x, group)):
        assert result is x
    equal(c.all_gather(x, group), x.unsqueeze(0))
    assert c.broadcast(x, group, 0) is x and c.broadcast_object(x, group, 0) is x
    assert c.all_gather_object("x", group) == ["x"]
