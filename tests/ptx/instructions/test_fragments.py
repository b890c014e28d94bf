"""Layouts of matrices in registers and in shared memory, against the PTX ISA's definitions written out as loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ptx.instructions.fragments import (
    MatrixDescriptor,
    accumulated,
    decoded,
    gathered,
    left_operand,
    right_operand,
    sum_places,
)
from tests.ptx.instructions.swizzle import swizzled


def _descriptor(start: int, leading: int, stride: int, code: int) -> int:
    return start >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | code << 62


def _swap(address: int, width: int) -> int:
    """Bit by bit: 4, 5 and 6 against 7, 8 and 9, as many as the width has."""
    for bit in range({16: 0, 32: 1, 64: 2, 128: 3}[width]):
        address ^= (address >> (7 + bit) & 1) << (4 + bit)
    return address


@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_swizzle_exchanges_pieces_by_the_bits_above(width: int) -> None:
    addresses = np.arange(0, 4096, 8)
    assert swizzled(addresses, width).tolist() == [_swap(int(address), width) for address in addresses]
    assert sorted(swizzled(addresses, width)) == list(addresses)


def test_descriptor_fields_are_where_the_isa_has_them() -> None:
    found = MatrixDescriptor.decode(_descriptor(0x12340, 8192, 1024, 1))
    assert found == MatrixDescriptor(0x12340, 8192, 1024, 128)
    assert [MatrixDescriptor.decode(code << 62).width for code in range(4)] == [16, 128, 64, 32]
    with pytest.raises(ValueError, match="base offset"):
        MatrixDescriptor.decode(1 << 49)


@pytest.mark.parametrize(("width", "code"), [(32, 3), (64, 2), (128, 1)])
@pytest.mark.parametrize("step", [0, 32])
def test_k_major_rows_lie_a_swizzle_apart(width: int, code: int, step: int) -> None:
    """[rows, width / 2] float16, tile after tile of 8 rows, as a swizzled copy leaves them; `step` bytes into a row."""
    rows, start = 64, 2048
    if step >= width:
        pytest.skip("a row has no second step of 32 bytes")
    values = np.random.default_rng(0).standard_normal((rows, width // 2)).astype(np.float16)
    shared, data = np.zeros(start + rows * width, np.uint8), values.view(np.uint8)
    for row in range(rows):
        for byte in range(width):
            shared[_swap(start + row * width + byte, width)] = data[row, byte]
    descriptor = MatrixDescriptor.decode(_descriptor(start + step, 0, 8 * width, code))
    assert np.array_equal(gathered(shared, descriptor, rows, True, "f16"), values[:, step // 2 : step // 2 + 16])


@pytest.mark.parametrize(("width", "code"), [(32, 3), (64, 2), (128, 1)])
def test_mn_major_panels_lie_a_leading_distance_apart(width: int, code: int) -> None:
    """[k, columns] in panels of `width` bytes of columns: 32 rows of k each, of which the second half is taken."""
    columns, start = 128, 4096
    panel = width // 2
    values = np.random.default_rng(0).standard_normal((32, columns)).astype(np.float16)
    shared = np.zeros(start + 32 * columns * 2, np.uint8)
    for k in range(32):
        for column in range(columns):
            address = start + column // panel * 32 * width + k * width + column % panel * 2
            shared[_swap(address, width) : _swap(address, width) + 2] = values[k, column : column + 1].view(np.uint8)
    descriptor = MatrixDescriptor.decode(_descriptor(start + 16 * width, 32 * width, 8 * width, code))
    assert np.array_equal(gathered(shared, descriptor, columns, False, "f16"), values[16:].T)


def test_without_swizzle_core_matrices_of_128_bytes_are_placed_by_both_distances() -> None:
    values = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float16)
    shared = np.zeros(8192, np.uint8)
    for row in range(16):
        for k in range(16):
            address = 512 + row // 8 * 2048 + k // 8 * 256 + row % 8 * 16 + k % 8 * 2
            shared[address : address + 2] = values[row, k : k + 1].view(np.uint8)
    descriptor = MatrixDescriptor.decode(_descriptor(512, 256, 2048, 0))
    assert np.array_equal(gathered(shared, descriptor, 16, True, "f16"), values)


@pytest.mark.parametrize(("rows", "columns"), [(16, 8), (64, 8), (64, 40), (64, 256)])
def test_sums_lie_as_the_isa_deals_them(rows: int, columns: int) -> None:
    places = sum_places(rows, columns)
    for thread in range(rows * 2):
        lane, warp = thread % 32, thread // 32
        for register in range(columns // 2):
            row = warp * 16 + lane // 4 + (8 if register % 4 >= 2 else 0)
            column = register // 4 * 8 + lane % 4 * 2 + register % 2
            assert places[register, thread] == row * columns + column
    assert np.array_equal(np.sort(places.reshape(-1)), np.arange(rows * columns))


@pytest.mark.parametrize("rows", [16, 64])
def test_left_operand_of_16_bits_lies_as_the_isa_deals_it(rows: int) -> None:
    values = np.random.default_rng(0).standard_normal((rows, 16)).astype(np.float16)
    registers = np.zeros((4, rows * 2, 2), np.float16)
    for thread in range(rows * 2):
        group, lane = thread % 32 // 4, thread % 4
        for index in range(8):
            row = thread // 32 * 16 + group + (8 if index in (2, 3, 6, 7) else 0)
            column = lane * 2 + index % 2 + (8 if index >= 4 else 0)
            registers[index // 2, thread, index % 2] = values[row, column]
    assert np.array_equal(left_operand(registers.view(np.uint32)[..., 0], "f16"), values)


def test_left_operand_of_tf32_lies_as_the_isa_deals_it() -> None:
    values = np.arange(16 * 8, dtype=np.float32).reshape(16, 8)
    registers = np.zeros((4, 32), np.float32)
    for lane in range(32):
        for index in range(4):
            registers[index, lane] = values[lane // 4 + index % 2 * 8, lane % 4 + index // 2 * 4]
    assert np.array_equal(left_operand(registers.view(np.uint32), "tf32"), values)


def test_right_operand_of_16_bits_lies_as_the_isa_deals_it() -> None:
    values = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float16)
    registers = np.zeros((2, 32, 2), np.float16)
    for lane in range(32):
        for index in range(4):
            registers[index // 2, lane, index % 2] = values[lane % 4 * 2 + index % 2 + index // 2 * 8, lane // 4]
    assert np.array_equal(right_operand(registers.view(np.uint32)[..., 0], "f16"), values.T[None])


@pytest.mark.parametrize(("kind", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_float8_values_are_those_of_torch(kind: str, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(dtype).double().numpy()
    assert np.array_equal(decoded(codes.numpy(), kind), expected, equal_nan=True)


def test_bfloat16_and_tf32_values() -> None:
    values = torch.randn(64).bfloat16()
    assert np.array_equal(decoded(values.view(torch.uint8).numpy(), "bf16"), values.double().numpy())
    kept = decoded(np.array([1 + 2**-10 + 2**-11], np.float32).view(np.uint8), "tf32")
    assert kept.tolist() == [1 + 2**-10]
    with pytest.raises(ValueError, match="s8"):
        decoded(np.zeros(4, np.uint8), "s8")


def test_a_product_is_rounded_once_and_a_row_depends_on_its_own_inputs_only() -> None:
    generator = np.random.default_rng(0)
    left, right = generator.standard_normal((64, 16)), generator.standard_normal((24, 16))
    sums = generator.standard_normal((64, 24)).astype(np.float32)
    found = accumulated(sums, left, right)
    assert np.array_equal(found[5:6], accumulated(sums[5:6], left[5:6], right))
    assert np.allclose(found, sums + left @ right.T, rtol=1e-6, atol=1e-6)
    left[3] = np.nan
    assert np.isnan(accumulated(sums, left, right)[3]).all()
    assert np.array_equal(np.delete(accumulated(sums, left, right), 3, 0), np.delete(found, 3, 0))
