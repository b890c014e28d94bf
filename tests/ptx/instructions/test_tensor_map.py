"""Tensor maps: boxes in and out, against slices of the tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.ptx.instructions.tensor_map import TensorMap

_BASE = 1 << 12


def _map(**changes: Any) -> TensorMap:
    of = {"base": _BASE, "shape": (64, 10), "strides": (2, 160), "box": (32, 4), "element_size": 2, "width": 64}
    return TensorMap(**{**of, **changes})


def _memory(tensor: np.ndarray) -> Any:
    """`view` for a tensor whose first byte is at _BASE."""

    def view(address: int, size: int) -> np.ndarray:
        assert address == _BASE
        assert size <= tensor.nbytes
        return tensor.reshape(-1).view(np.uint8)

    return view


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"base": _BASE + 8}, "16 divides"),
        ({"strides": (2, 136)}, "16 divides"),
        ({"strides": (4, 160)}, "side by side"),
        ({"box": (32, 257)}, "1 to 256"),
        ({"box": (64, 4)}, "no longer than its swizzle"),
        ({"box": (32,)}, "as many strides"),
        ({"box": (4, 4), "width": 16}, "16 bytes divide"),
        ({"width": 48}, "a swizzle of"),
        ({"box": (16, 4)}, "not modelled"),
    ],
)
def test_what_the_driver_refuses_is_refused(wrong: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        _map(**wrong)


@pytest.mark.parametrize("start", [(0, 0), (32, 6), (48, 8), (-8, -1), (64, 0), (0, 40), (-40, 0)])
@pytest.mark.parametrize("fill_nan", [False, True])
def test_a_box_reads_the_tensor_and_its_fill_outside(start: tuple[int, int], fill_nan: bool) -> None:
    tensor = np.zeros((10, 80), np.float16)
    tensor[:, :64] = np.random.default_rng(0).standard_normal((10, 64))
    found = _map(fill_nan=fill_nan).load(_memory(tensor), start).view(np.float16).reshape(4, 32)
    around = np.full((110, 264), np.nan if fill_nan else 0, np.float16)
    around[50:60, 100:164] = tensor[:, :64]
    row, column = start[1] + 50, start[0] + 100
    assert np.array_equal(found, around[row : row + 4, column : column + 32], equal_nan=True)


@pytest.mark.parametrize("start", [(0, 0), (48, 8), (-8, -1), (0, 40)])
def test_a_box_writes_the_tensor_and_nothing_outside(start: tuple[int, int]) -> None:
    tensor, data = np.zeros((10, 80), np.float16), np.random.default_rng(0).standard_normal((4, 32)).astype(np.float16)
    _map().store(_memory(tensor), start, data.view(np.uint8).reshape(-1))
    around = np.zeros((110, 264), np.float16)
    around[start[1] + 50 : start[1] + 54, start[0] + 100 : start[0] + 132] = data
    assert np.array_equal(tensor[:, :64], around[50:60, 100:164])
    assert not tensor[:, 64:].any()


def test_five_dimensions() -> None:
    tensor = np.random.default_rng(0).standard_normal((3, 2, 4, 5, 8)).astype(np.float32)
    strides = tuple(reversed(tensor.strides))
    found = _map(shape=(8, 5, 4, 2, 3), strides=strides, box=(8, 2, 3, 1, 2), element_size=4, width=32)
    box = found.load(_memory(tensor), (0, 3, 1, 1, 1)).view(np.float32).reshape(2, 1, 3, 2, 8)
    assert np.array_equal(box, tensor[1:3, 1:2, 1:4, 3:5])


def test_places_of_a_box_follow_its_swizzle() -> None:
    places = _map().places(1024)
    row, piece = np.divmod(np.arange(16), 4)
    assert np.array_equal(places, 64 + row * 4 + (piece ^ row // 2))
    with pytest.raises(ValueError, match="128 has to divide"):
        _map().places(1040)
