"""Weights: packing, rows, rounding, gradients."""

from __future__ import annotations

import pytest
import torch

from engine.errors import InputError
from engine.kernels.op import extension
from engine.kernels.weight import Weight
from tests.row_invariance import assert_same_bits

SHAPES = [(1, 1), (7, 9), (16, 32), (17, 41), (41, 130), (130, 7)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_packing_and_unpacking_gives_the_same_bits(shape: tuple[int, int], dtype: torch.dtype) -> None:
    dense = torch.randn(shape).to(dtype)
    weight = Weight("w", shape, dtype, packed=True)
    weight.load_(dense)
    assert_same_bits(weight.dense(), dense, "unpacked")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_loaded_at_odd_offsets_leave_the_others_alone(dtype: torch.dtype) -> None:
    expected = torch.randn(61, 13).to(dtype)
    weight = Weight("w", (61, 13), dtype, packed=True)
    weight.load_(expected)
    for row, rows in ((0, 1), (3, 20), (17, 15), (60, 1), (5, 0)):
        part = torch.randn(rows, 13).to(dtype)
        weight.load_(part, row)
        expected[row : row + rows] = part
        assert_same_bits(weight.dense(), expected, f"after loading [{row}, {row + rows})")
        assert_same_bits(weight.dense(row, rows), part, f"rows [{row}, {row + rows})")


def test_packed_layout_is_the_documented_one() -> None:
    dense = torch.arange(20 * 5, dtype=torch.float32).view(20, 5)
    fp32 = Weight("w", (20, 5), torch.float32, packed=True)
    fp32.load_(dense)
    assert fp32.data.shape == (2, 5, 16)
    assert fp32.data[1, 3, 2] == dense[18, 3]
    half = Weight("w", (20, 5), torch.bfloat16, packed=True)
    half.load_(dense)
    assert half.data.shape == (2, 3, 16, 2)
    assert half.data[1, 1, 2, 1] == dense[18, 3]


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_is_zero(dtype: torch.dtype) -> None:
    weight = Weight("w", (19, 7), dtype, packed=True)
    weight.load_(torch.full((19, 7), torch.nan))
    assert int(weight.data.isnan().sum()) == 19 * 7
    assert int((weight.data == 0).sum()) == weight.data.numel() - 19 * 7


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("packed", [True, False])
def test_loading_rounds_to_nearest_even(source: torch.dtype, packed: bool) -> None:
    dense = (torch.randn(35, 21) * torch.logspace(-3, 3, 21)).to(source)
    weight = Weight("w", (35, 21), torch.bfloat16, packed)
    weight.load_(dense)
    assert_same_bits(weight.dense(), dense.float().to(torch.bfloat16), "rounded")
    assert_same_bits(weight.dense(dtype=torch.float32), dense.float().bfloat16().float(), "widened")


def test_a_strided_or_transposed_source_loads_like_a_dense_one() -> None:
    source = torch.randn(40, 90)
    for view in (source[:, 3:24], source[::2, 10:31], source.T[5:25, :21]):
        weight = Weight("w", (20, 21), torch.float32, packed=True)
        weight.load_(view[:20])
        assert_same_bits(weight.dense(), view[:20].contiguous(), "loaded")


def test_vectors_are_dense_and_load_by_rows() -> None:
    weight = Weight("b", (10,), torch.bfloat16, packed=False, decay=False)
    weight.load_(torch.ones(4), row=3)
    assert weight.dense().tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 0, 0]
    assert weight.dense(2, 3, torch.float32).tolist() == [0, 1, 1]


def test_gradient_is_dense_fp32_and_keeps_its_memory() -> None:
    weight = Weight("w", (17, 5), torch.bfloat16, packed=True)
    assert weight.grad is None
    weight.zero_grad()
    assert weight.grad is None
    buffer = weight.grad_buffer()
    assert buffer.shape == (17, 5) and buffer.dtype == torch.float32 and not buffer.any()
    buffer += 1
    weight.zero_grad()
    assert weight.grad is buffer and not buffer.any()


def test_storage_is_aligned_to_cache_lines() -> None:
    for rows in (1, 17, 300):
        for dtype in DTYPES:
            assert Weight("w", (rows, 33), dtype, packed=True).data.data_ptr() % 64 == 0


def test_one_and_two_threads_pack_the_same() -> None:
    dense = torch.randn(203, 65)
    threads = extension().num_threads()
    packed = []
    try:
        for count in (1, 2):
            extension().set_num_threads(count)
            weight = Weight("w", (203, 65), torch.bfloat16, packed=True)
            weight.load_(dense)
            packed.append(weight.data)
    finally:
        extension().set_num_threads(threads)
    assert_same_bits(packed[0], packed[1], "two threads against one")


def test_what_does_not_fit_is_refused_by_name() -> None:
    weight = Weight("layer.w", (8, 4), torch.float32, packed=True)
    with pytest.raises(InputError, match=r"layer\.w.*\(3, 5\)"):
        weight.load_(torch.zeros(3, 5))
    with pytest.raises(InputError, match=r"8 rows; \[6, 9\)"):
        weight.load_(torch.zeros(3, 4), row=6)
    with pytest.raises(InputError, match=r"int64"):
        weight.load_(torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(InputError, match=r"\[-1, 2\)"):
        weight.dense(-1, 3)
    with pytest.raises(InputError, match=r"int8"):
        Weight("w", (8, 4), torch.int8, packed=True)
    with pytest.raises(InputError, match=r"only a matrix"):
        Weight("w", (8,), torch.float32, packed=True)
    with pytest.raises(InputError, match=r"a matrix \[N, K\] or a vector"):
        Weight("w", (8, 0), torch.float32, packed=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_on_the_meta_device_has_the_size_of_a_real_one_and_no_memory(dtype: torch.dtype) -> None:
    real = Weight("w", (41, 131), dtype, packed=True)
    with torch.device("meta"):
        weight = Weight("w", (41, 131), dtype, packed=True)
        gradient = weight.grad_buffer()
    assert weight.data.is_meta and gradient.is_meta
    assert weight.nbytes == real.nbytes and gradient.shape == real.grad_buffer().shape
    assert not Weight("w", (41, 131), dtype, packed=True).data.is_meta


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slice_shares_the_storage(dtype: torch.dtype, packed: bool) -> None:
    expected = torch.randn(75, 13).to(dtype)
    weight = Weight("w", (75, 13), dtype, packed=packed)
    weight.load_(expected)
    for row, rows in ((16, 32), (64, 11), (0, 75)):
        part = weight.slice(row, rows)
        assert_same_bits(part.dense(), expected[row : row + rows], f"rows [{row}, {row + rows})")
        expected[row : row + rows] = torch.randn(rows, 13).to(dtype)
        part.load_(expected[row : row + rows])
        assert_same_bits(weight.dense(), expected, f"after loading [{row}, {row + rows})")
    assert weight.slice(16, 32).name == "w[16:48]" and weight.slice(0, 75).name == "w"


def test_a_slice_has_a_gradient_of_its_own_unless_it_shares() -> None:
    weight = Weight("w", (40, 3), torch.float32, packed=True)
    own, shared = weight.slice(16, 24), weight.slice(16, 24, share_grad=True)
    own.grad_buffer().fill_(1.0)
    assert weight.grad is None
    weight.grad_buffer().fill_(2.0)
    assert (shared.grad_buffer() == 2.0).all() and (own.grad_buffer() == 1.0).all()
    weight.slice(16, 24, share_grad=True).zero_grad()
    assert float(weight.grad_buffer().sum()) == 2.0 * 16 * 3


def test_a_packed_weight_is_cut_between_panels() -> None:
    weight = Weight("w", (40, 3), torch.float32, packed=True)
    for row, rows in ((8, 16), (0, 20)):
        with pytest.raises(InputError, match="whole panels"):
            weight.slice(row, rows)
    with pytest.raises(InputError, match="outside"):
        weight.slice(32, 16)
