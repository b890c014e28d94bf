"""Blocks of rows do not depend on the ranks; ranks get even, contiguous shares of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import ParallelConfig
from engine.kernels.weight import Weight
from engine.model import Transformer
from engine.parallel.mesh import Mesh, make_mesh
from engine.parallel.ownership import RowBlock, Shares, deal_blocks, row_blocks
from engine.parallel.shards import Placement
from engine.parts import Part
from tests.parallel.pool import Pool
from tests.tiny import FAMILIES, tiny_config


def part(weight: Weight, row: int, rows: int, owned: bool = True) -> Part:
    shape = (rows, *weight.shape[1:])
    return Part("p", weight, row, shape, tuple(0 for _ in shape), shape, owned)


def matrix(rows: int, columns: int = 8) -> Weight:
    return Weight("w", (rows, columns), torch.float32, packed=True)


def spans(blocks: list[RowBlock]) -> list[tuple[int, int, bool]]:
    return [(block.row, block.rows, block.counted) for block in blocks]


# ---- blocks ----


def test_blocks_are_whole_panels_and_the_last_is_what_is_left() -> None:
    weight = matrix(75)
    assert spans(row_blocks([part(weight, 0, 75)], 32 * 8 + 100)) == [(0, 32, True), (32, 32, True), (64, 11, True)]


def test_a_block_holds_one_panel_at_least() -> None:
    assert spans(row_blocks([part(matrix(40), 0, 40)], 1)) == [(0, 16, True), (16, 16, True), (32, 8, True)]


def test_parts_that_meet_inside_a_panel_share_a_block() -> None:
    """Gate and up of 25 rows each: rows 16 to 31 are of both."""
    weight = matrix(50)
    parts = [part(weight, 0, 25), part(weight, 25, 25)]
    assert spans(row_blocks(parts, 16 * 8)) == [(0, 16, True), (16, 16, True), (32, 16, True), (48, 2, True)]


def test_rows_that_another_rank_counts_are_blocks_of_their_own() -> None:
    weight = matrix(64)
    parts = [part(weight, 0, 32), part(weight, 32, 16, owned=False), part(weight, 48, 16, owned=False)]
    assert spans(row_blocks(parts, 1 << 20)) == [(0, 32, True), (32, 32, False)]


def test_a_vector_is_one_block() -> None:
    weight = Weight("b", (5000,), torch.float32, packed=False)
    assert spans(row_blocks([part(weight, 0, 5000)], 16)) == [(0, 5000, True)]


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_element_is_counted_once_over_tensor_parallel_ranks(architecture: str, tp: int) -> None:
    config = tiny_config(architecture)
    whole = sum(block.size for block in row_blocks(Transformer(config, torch.float32).parts(), 1024))
    counted = 0
    for rank in range(tp):
        mesh = Mesh.layout(ParallelConfig(tp=tp), tp, rank)
        model = Transformer(config, torch.float32, Placement(mesh))
        blocks = row_blocks(model.parts(), 1024)
        assert sum(b.size for b in blocks) == sum(w.data.numel() for w in model.weights() if not w.packed) + sum(
            w.shape[0] * w.shape[1] for w in model.weights() if w.packed
        )
        counted += sum(block.size for block in blocks if block.counted)
    assert counted == whole


# ---- shares ----

sizes = st.lists(st.integers(1, 1000), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 9))
def test_shares_are_contiguous_and_even_to_a_block(sizes: list[int], num_ranks: int) -> None:
    owners = deal_blocks(sizes, [0] * num_ranks)
    assert owners == sorted(owners) and min(owners) >= 0 and max(owners) < num_ranks
    loads = [sum(s for s, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in range(num_ranks)]
    assert max(loads) <= sum(sizes) / num_ranks + max(sizes)


@settings(max_examples=60, deadline=None)
@given(st.lists(sizes, min_size=1, max_size=12), st.integers(1, 9))
def test_later_buckets_make_up_for_earlier_ones(buckets: list[list[int]], num_ranks: int) -> None:
    """However many buckets of few blocks: nobody is more than a block or two above the others' mean."""
    loads = [0] * num_ranks
    for bucket in buckets:
        for owner, size in zip(deal_blocks(bucket, loads), bucket, strict=True):
            loads[owner] += size
    biggest = max(size for bucket in buckets for size in bucket)
    assert max(loads) <= sum(loads) / num_ranks + 2 * biggest


def test_both_ends_of_a_pipeline_deal_a_tied_embedding_alike() -> None:
    dealt = []
    for rank in (0, 2):  # the first and the last stage, of the first replica
        mesh = Mesh.layout(ParallelConfig(dp=2, pp=2), 4, {0: 0, 2: 1}[rank])
        model = Transformer(tiny_config(tie_word_embeddings=True), torch.float32, Placement(mesh))
        blocks = row_blocks(model.parts(), 1024)
        shares = Shares(blocks, model.gradient_buckets(), mesh, share_grad=False, tied=model.tied_weights)
        bucket = next(b for b in shares.buckets if b.blocks[0].weight is model.tied_weights[0])
        dealt.append([(b.row, b.rows, owner) for b, owner in zip(bucket.blocks, bucket.owners, strict=True)])
    assert dealt[0] == dealt[1] and len(dealt[0]) > 4


@pytest.mark.parametrize("rank", [0, 1])
def test_a_head_that_is_the_embedding_is_dealt_like_it_and_stepped_once(rank: int) -> None:
    mesh = Mesh.layout(ParallelConfig(dp=2), 2, rank)
    model = Transformer(tiny_config(tie_word_embeddings=True), torch.float32, Placement(mesh))
    blocks = row_blocks(model.parts(), 1024)
    shares = Shares(blocks, model.gradient_buckets(), mesh, share_grad=False, tied=model.tied_weights)
    head, embedding = shares.gradients[0], shares.gradients[-1]
    assert [(b.row, b.rows, b.counted) for b in head.blocks] == [(b.row, b.rows, b.counted) for b in embedding.blocks]
    assert head.owners == embedding.owners and set(head.owners) == {0, 1}
    assert [id(bucket) for bucket in shares.buckets] == [id(bucket) for bucket in shares.gradients[1:]]
    for summed, stepped in zip(head.own, embedding.own, strict=True):
        assert summed.data.data_ptr() == stepped.data.data_ptr()
        assert summed.grad_buffer().data_ptr() != stepped.grad_buffer().data_ptr()


@pytest.mark.parametrize("tied", [False, True])
def test_buckets_hold_every_weight_once(tied: bool) -> None:
    model = Transformer(tiny_config(tie_word_embeddings=tied), torch.float32)
    buckets = model.gradient_buckets()
    assert [weight.name for weight in buckets[-1]] == ["model.embed_tokens.weight"]
    assert buckets[0] == [model.head] and len(buckets) == 4
    stepped = buckets[tied:]  # a tied head is the embedding's storage, with a gradient of its own
    assert sorted(id(w) for bucket in stepped for w in bucket) == sorted(id(w) for w in model.weights())


# ---- publishing ----


def publish(dtype: torch.dtype) -> tuple[list[torch.Tensor], bool]:
    """Each rank writes its number to its own rows; what all rows are then, and whether they are where they were."""
    mesh = make_mesh(ParallelConfig())
    model = Transformer(tiny_config(), dtype, Placement(mesh))
    addresses = [weight.data.data_ptr() for weight in model.weights()]
    shares = Shares(row_blocks(model.parts(), 1024), model.gradient_buckets(), mesh, share_grad=False)
    for weight in shares.own:
        weight.load_(torch.full(weight.shape, float(mesh.data.index + 1)))
    for finish in [shares.start_publishing(bucket) for bucket in shares.buckets]:
        finish()
    expected = {id(weight): torch.zeros(weight.shape) for weight in model.weights()}
    for bucket in shares.buckets:
        for block, owner in zip(bucket.blocks, bucket.owners, strict=True):
            expected[id(block.weight)][block.row : block.row + block.rows] = owner + 1
    assert all(torch.equal(w.dense(dtype=torch.float32), expected[id(w)]) for w in model.weights())
    stayed = addresses == [weight.data.data_ptr() for weight in model.weights()]
    mesh.close()
    return [weight.data.clone() for weight in model.weights()], stayed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_ranks_end_with_the_rows_of_all_in_place(pool4: Pool, dtype: torch.dtype) -> None:
    results = pool4.run(publish, dtype)
    for weights, stayed in results:
        assert stayed
        assert all(torch.equal(a, b) for a, b in zip(weights, results[0][0], strict=True))
