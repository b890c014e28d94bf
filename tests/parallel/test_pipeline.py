"""The pipeline's executor with real processes: the bits of one rank, whatever the schedule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engine.config import ParallelConfig
from engine.kernels.linear import linear
from engine.kernels.op import cpu_missing
from engine.kernels.rms_norm import add_rms_norm
from engine.kernels.weight import Weight
from engine.parallel.mesh import make_mesh
from engine.parallel.pipeline import run_pipeline
from engine.parallel.schedule import Schedule, forwards_only, schedule
from tests.parallel.pool import Pool
from tests.row_invariance import assert_same_bits

if cpu_missing():
    pytest.skip(cpu_missing(), allow_module_level=True)

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble")
WIDTH = 48


def make_stage(number: int) -> tuple[Weight, Weight]:
    generator = torch.Generator().manual_seed(number)
    norm, matrix = (
        Weight("n", (WIDTH,), torch.bfloat16, packed=False),
        Weight("w", (WIDTH, WIDTH), torch.bfloat16, True),
    )
    norm.load_(torch.rand(WIDTH, generator=generator) + 0.5)
    matrix.load_(torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5)
    return norm, matrix


def inputs(rows: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(n, WIDTH, generator=generator).bfloat16().requires_grad_() for n in rows]


def through(stage: tuple[Weight, Weight], x: Tensor) -> Tensor:
    norm, matrix = stage
    x, h = add_rms_norm(x, None, norm, 1e-5)
    return x + linear(h, matrix)


def gradients_of(stages: list[tuple[Weight, Weight]]) -> list[tuple[Tensor, Tensor]]:
    return [(norm.grad_buffer(), matrix.grad_buffer()) for norm, matrix in stages]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the ranks have: torch's own sums depend on the number of threads, and the loss of these stages is one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def on_one_rank(num_stages: int, rows: list[int]) -> tuple[list[float], list[tuple[Tensor, Tensor]]]:
    stages, losses = [make_stage(number) for number in range(num_stages)], []
    for x in inputs(rows):
        for stage in stages:
            x = through(stage, x)
        loss = x.float().square().sum()
        loss.backward()
        losses.append(float(loss.detach()))
    return losses, gradients_of(stages)


def on_this_rank(plan: Schedule, rows: list[int]) -> tuple[list[float], list[tuple[Tensor, Tensor]]]:
    """Losses (on the last rank) and gradients of this rank's chunks."""
    rank = dist.get_rank() if plan.num_stages > 1 else 0
    config = ParallelConfig(pp=plan.num_stages, virtual_stages=plan.num_chunks, schedule=plan.name)
    mesh = make_mesh(config)
    stages = [make_stage(plan.stage(rank, chunk)) for chunk in range(plan.num_chunks)]
    first, losses = inputs(rows), [0.0] * len(rows)

    def forward(number: int, chunk: int, stream: Tensor | None) -> Tensor:
        out = through(stages[chunk], first[number] if stream is None else stream)
        if plan.stage(rank, chunk) < plan.last_stage:
            return out
        loss = out.float().square().sum()
        losses[number] = float(loss.detach())
        return loss

    run_pipeline(plan, mesh.links, forward, [(n, WIDTH) for n in rows], torch.bfloat16)
    mesh.close()
    return losses, gradients_of(stages)


def assert_bits_of_one_rank(plan: Schedule, rows: list[int], results: list[Any]) -> None:
    losses, gradients = on_one_rank(plan.last_stage + 1, rows)
    assert results[-1][0] == losses
    for rank, (_, mine) in enumerate(results):
        for chunk, (norm, matrix) in enumerate(mine):
            stage = plan.stage(rank, chunk)
            assert_same_bits(norm, gradients[stage][0], f"norm of stage {stage}")
            assert_same_bits(matrix, gradients[stage][1], f"matrix of stage {stage}")


# 5 micro-batches, from one row to 3 MB: far more than a socket holds, so a send waits for its receive.
ROWS = [3, 32768, 1, 700, 64]


@pytest.mark.parametrize("name", SCHEDULES)
def test_two_ranks_run_every_schedule_with_the_bits_of_one(pool2: Pool, name: str) -> None:
    plan = schedule(name, 2, len(ROWS), 3 if name == "interleaved" else 1)
    assert_bits_of_one_rank(plan, ROWS, pool2.run(on_this_rank, plan, ROWS))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("count", [2, 9])
def test_four_ranks_run_every_schedule_with_the_bits_of_one(pool4: Pool, name: str, count: int) -> None:
    plan, rows = schedule(name, 4, count, 2 if name == "interleaved" else 1), (ROWS * 2)[:count]
    assert_bits_of_one_rank(plan, rows, pool4.run(on_this_rank, plan, rows))


@pytest.mark.parametrize("chunks", [1, 3])
def test_one_rank_hands_its_chunks_on_to_itself(chunks: int) -> None:
    plan = schedule("interleaved" if chunks > 1 else "zero_bubble", 1, 4, chunks)
    assert_bits_of_one_rank(plan, [3, 9, 1, 17], [on_this_rank(plan, [3, 9, 1, 17])])


@pytest.mark.parametrize("name", SCHEDULES)
def test_micro_batch_without_rows_passes(pool2: Pool, name: str) -> None:
    plan, rows = schedule(name, 2, 4, 2 if name == "interleaved" else 1), [5, 0, 7, 0]
    assert_bits_of_one_rank(plan, rows, pool2.run(on_this_rank, plan, rows))


def scored(plan: Schedule, rows: list[int]) -> tuple[list[float], bool]:
    losses, gradients = on_this_rank(forwards_only(plan), rows)
    return losses, any(bool(gradient.any()) for pair in gradients for gradient in pair)


def test_forwards_alone_leave_no_gradient(pool2: Pool) -> None:
    (_, first_learned), (losses, second_learned) = pool2.run(scored, schedule("interleaved", 2, 3, 2), [5, 40, 2])
    assert losses == on_one_rank(4, [5, 40, 2])[0]
    assert not first_learned and not second_learned
