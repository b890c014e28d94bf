"""The CUDA decode. Without a GPU: what it refuses, what it is given, and who is chosen; on one, Triton's bits."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.errors import ConfigError, InputError
from engine.kernels.attention import AttentionSpec, allocate_pages, attention
from engine.kernels.attention_call import AttentionCall
from engine.kernels.op import OPS, cuda_not_built, use_backend
from engine.kernels.rope import rope_table
from engine.kernels.swiglu import swiglu
from tests.kernels.cases import randn
from tests.kernels.cuda.cases import decoded, tables_of
from tests.kernels.test_attention import plan_of
from tests.kernels.triton.cases import DEVICE, needs_triton

pytestmark = [needs_triton, pytest.mark.skipif(bool(cuda_not_built()), reason=cuda_not_built() or "built")]
GPU = torch.cuda.is_available()
SPEC = AttentionSpec(8, 2, 64)


def call(spec: AttentionSpec = SPEC, dtype: torch.dtype = torch.bfloat16, shift: int = 0, **tiling: int) -> None:
    """The decode of one row that sees 100 keys, on memory that nothing may touch."""
    from engine.kernels.cuda.attention import decode
    from engine.kernels.triton.attention import tiles_of

    with use_backend("triton"):
        keys, values = allocate_pages(7, 16, spec, torch.bfloat16)
    plan = plan_of([1], [100], tables_of([100], list(range(7)))).on_device(torch.device("cpu"))
    tiles = replace(tiles_of(spec, torch.bfloat16, torch.device("cpu")), **{"decode_m": 16, **tiling})
    lists = plan.lists(spec.num_heads // spec.num_kv_heads, spec.num_kv_heads, spec.window or 0, tiles)
    size = spec.num_heads * spec.head_dim
    q = torch.zeros(2 * size, dtype=dtype)[shift : shift + size].view(1, spec.num_heads, spec.head_dim)
    sums, softmaxes = torch.zeros(64), torch.zeros(64)
    decode(q, keys, values, torch.zeros_like(q), sums, softmaxes, spec, plan, lists, tiles)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"spec": AttentionSpec(8, 2, 80)}, "head_dim is 80; it takes 64, 96, 128 and 256"),
        ({"dtype": torch.float32}, "queries are of type 0"),
        ({"dtype": torch.float16}, "pages are of type 1"),
        ({"decode_m": 64}, "tiles of 64 rows; it takes up to 16"),
        ({"block_n": 32}, "tiles of 32 keys and splits of 512; the bits need 128 and 512"),
        ({"split": 1024}, "splits of 1024"),
        ({"shift": 1}, "multiples of 16 bytes"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused_before_a_launch(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        call(**options)


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_without_a_gpu_a_launch_says_so() -> None:
    with pytest.raises(RuntimeError, match="attention_decode: no device"):
        call()


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_other_ops_run_on_triton_beside_it() -> None:
    x, qkv = randn(3, 8), randn(1, SPEC.row_size)
    with use_backend("triton"):
        expected = swiglu(x)
    with use_backend("cuda"):
        assert torch.equal(swiglu(x), expected)
        with pytest.raises(ConfigError, match="takes cuda tensors"):
            attention(qkv, SPEC, rope_table(64, 1e4, None, 8), plan_of([1], [1]))


@pytest.mark.parametrize("op", ["attention", "attention_e4m3"])
def test_it_is_unproven_and_after_triton(op: str) -> None:
    names = [backend.name for backend in OPS[op].backends]
    assert names.index("cuda") == names.index("triton") + 1
    assert not OPS[op].backends[names.index("cuda")].proven


def test_it_is_given_tiles_of_at_most_16_rows_and_triton_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.kernels.cuda import attention as cuda_attention

    given: list[Any] = []
    monkeypatch.setattr(cuda_attention, "decode", lambda *arguments: given.append(arguments))
    lengths = [1, 4, 30]  # 4, 16 and 120 rows of a key/value head
    plan = plan_of(lengths, [20, 30, 30], tables_of([20, 30, 30], list(range(6))))
    with use_backend("triton"), torch.device(DEVICE):
        keys, values = allocate_pages(6, 16, SPEC, torch.float32)
    qkv, rope = randn(sum(lengths), SPEC.row_size).to(DEVICE), rope_table(64, 1e4, None, 64).to(DEVICE)
    out, _ = cuda_attention.forward(AttentionCall(qkv, SPEC, rope, plan, keys, values), False)
    ((q, *_, lists, tiles),) = given
    assert tuple(q.shape) == (35, 8, 64) and tiles.decode_m == 16
    items = lists.decode[: 8 * lists.num_decode].view(-1, 8)
    assert sorted(items[:, 1].tolist()) == [4, 16] and lists.num_walk > 0
    with use_backend("triton"):
        expected = attention(qkv, SPEC, rope, plan, keys, values)
    assert torch.equal(out[5:], expected[5:])  # Triton's share; the rows before are the decode's to fill


def test_it_is_told_how_many_rows_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph of two rows is captured while its plan may hold a batch of three: the third row is nobody's memory."""
    from engine.kernels.cuda import attention as cuda_attention

    given: list[Any] = []
    extension = SimpleNamespace(BFLOAT16=1, FLOAT16=2, E4M3=3, attention_decode=lambda *values: given.append(values))
    monkeypatch.setattr(cuda_attention, "cuda_extension", lambda: extension)
    plan = plan_of([1, 1, 1], [20, 30, 30], tables_of([20, 30, 30], list(range(6))))
    plan.on_device(torch.device(DEVICE)).reserve(8, 8, 64)
    with use_backend("triton"), torch.device(DEVICE):
        keys, values = allocate_pages(6, 16, SPEC, torch.float32)
    qkv, rope = randn(2, SPEC.row_size).to(DEVICE), rope_table(64, 1e4, None, 64).to(DEVICE)
    cuda_attention.forward(AttentionCall(qkv, SPEC, rope, plan, keys, values), False)
    ((*_, shape, _, _, _, _),) = given
    assert shape == (2, 8, 2, 64, 16, 0, 16, 32, 512)


@pytest.mark.skipif(not GPU, reason="there is no GPU")
@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_decode_has_the_bits_of_triton(
    head_dim: int, dtype: torch.dtype, window: int | None, kv_dtype: torch.dtype | None
) -> None:
    spec = AttentionSpec(8, 2, head_dim, window=window, kv_dtype=kv_dtype)
    assert torch.equal(decoded("cuda", spec, dtype), decoded("triton", spec, dtype))
