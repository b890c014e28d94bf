"""The two decodes of a GPU, Triton's and the one in CUDA C++, have the same bits: the order of every sum between matrix
instructions is one. What a real matrix instruction does inside (wgmma here, mma.sync there) takes a GPU to compare."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
from torch import Tensor

from engine.kernels.attention import AttentionSpec
from engine.kernels.attention_call import AttentionCall
from engine.kernels.cuda import attention as cuda_attention
from engine.kernels.graph import empty
from engine.kernels.rope import rope_table
from engine.kernels.triton import attention as triton_attention
from tests.kernels.cuda import simulated as cuda
from tests.kernels.cuda.test_simulated import BF16, CONTEXTS, E4M3, FP16, NEW, Pool, rows_of
from tests.kernels.test_attention import plan_of
from tests.ptx.launches import simulated
from tests.row_invariance import assert_same_bits

pytestmark = pytest.mark.skipif(cuda.NVCC is None, reason="nvcc is not here")


def decoded(pool: Pool, qkv: Tensor, by_cuda: bool) -> list[Tensor]:
    """Output, and what goes through memory in float32: products with V, maxima and sums of splits."""
    made: list[Tensor] = []

    def noted(*arguments: Any) -> Tensor:
        made.append(empty(*arguments))
        return made[-1]

    plan = plan_of(NEW, CONTEXTS, pool.tables)
    rope = rope_table(pool.spec.head_dim, 1e4, None, 1024)
    call = AttentionCall(qkv, pool.spec, rope, plan, pool.keys, pool.values)
    with simulated() as launches, cuda.simulated() as given, patch.object(triton_attention, "empty", noted):
        (cuda_attention if by_cuda else triton_attention).forward(call, False)
    assert bool(given) == by_cuda and by_cuda != any(launch.name == "_attend" for launch in launches)
    assert [each.shape[-1] for each in made[1:]] == [pool.spec.head_dim, 2]
    return made


@pytest.mark.parametrize(
    ("heads", "window", "dtype", "kv_dtype"),
    [
        ((8, 2, 64), None, BF16, None),
        ((6, 2, 96), 300, FP16, None),
        ((8, 2, 128), None, BF16, None),
        ((4, 1, 64), None, BF16, E4M3),
        ((4, 1, 128), 300, BF16, E4M3),
        ((4, 1, 256), None, BF16, None),
    ],
    ids=str,
)
def test_decode_in_cuda_has_the_bits_of_triton(heads, window, dtype, kv_dtype):
    query_heads, kv_heads, head_dim = heads
    pool = Pool(AttentionSpec(query_heads, kv_heads, head_dim, window=window, kv_dtype=kv_dtype), dtype, CONTEXTS)
    qkv = rows_of(pool, sum(NEW))
    by_triton, by_cuda = decoded(pool, qkv, by_cuda=False), decoded(pool, qkv, by_cuda=True)
    for name, expected, actual in zip(("out", "products with V", "softmaxes"), by_triton, by_cuda, strict=True):
        assert expected.numel() and expected.isfinite().all()
        assert_same_bits(actual, expected, name)
