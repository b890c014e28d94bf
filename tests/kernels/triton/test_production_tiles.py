"""One set of bits with the tiles of production: the interpreter is too slow for these and does not know their
instructions, so this is what a GPU has to confirm before an engine on it may be called exact."""

import pytest
import torch

from engine.kernels.attention import AttentionSpec
from engine.kernels.linear import linear
from engine.kernels.op import use_backend
from engine.kernels.rope import rope_table
from engine.kernels.token_logprob import token_logprob
from tests.kernels.cases import randn
from tests.kernels.test_attention import plan_of
from tests.kernels.triton.cases import DEVICE, DTYPES, device_weight, needs_triton
from tests.kernels.triton.test_attention import Cache, forward, norms_of
from tests.row_invariance import assert_same_bits

pytestmark = [needs_triton, pytest.mark.skipif(DEVICE == "cpu", reason="it takes a GPU")]
LENGTHS = [1, 700, 1290]  # one, two and three splits of 512 keys
# (H, K, Dh, window): every width of tile; groups that divide tiles and that do not
SHAPES = [(4, 4, 64, None), (8, 2, 128, None), (8, 1, 128, 600), (6, 2, 96, None), (10, 2, 256, None), (4, 2, 32, 100)]
MODES = [
    ("prefill", 128, [[1], [700], [1290]]),
    ("chunks", 16, [[1], [33, 500, 167], [512, 300, 478]]),
    ("decode", 64, [[1], [699, 1], [1280, *[1] * 10]]),
    ("decode across a split", 32, [[1], [510, *[1] * 4, 186], [1022, 1, 1, 1, 200, 65]]),
]


def same_bits_in_every_mode(spec, dtype, tiles_of, walk=None):
    norms, rope = norms_of(spec, dtype), rope_table(spec.head_dim, 10000.0, None, max(LENGTHS)).to(DEVICE)
    qkv = randn(sum(LENGTHS), spec.row_size).to(DEVICE, dtype)
    options = {"norms": norms, "rope": rope, "tiles": tiles_of(spec, dtype, qkv.device), "walk": walk}
    trained, _ = forward(qkv, spec, plan_of(LENGTHS), want_lse=True, **options)
    assert trained.isfinite().all()
    for mode, page_size, pieces in MODES:
        out = Cache(spec, dtype, LENGTHS, page_size).run(qkv, pieces, **options)
        assert_same_bits(out, trained, f"{mode}, pages of {page_size}")


@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn], ids=["kv as the model", "kv in e4m3"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_has_the_same_bits_in_training_prefill_chunks_and_decode(shape, dtype, kv_dtype):
    from engine.kernels.triton.attention import tiles_of

    same_bits_in_every_mode(AttentionSpec(*shape, kv_dtype=kv_dtype), dtype, tiles_of)


@pytest.mark.skipif(DEVICE == "cpu" or torch.cuda.get_device_capability()[0] != 9, reason="it takes a Hopper GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[2] in (64, 96, 128)], ids=str)
def test_attention_for_hopper_has_the_same_bits_in_training_prefill_chunks_and_decode(shape, dtype):
    from engine.kernels.hopper.attention import tiles_of, walk

    same_bits_in_every_mode(AttentionSpec(*shape), dtype, tiles_of, walk)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_has_the_same_bits_for_any_number_of_rows(dtype):
    x, weight = randn(2100, 1024).to(DEVICE, dtype), device_weight(randn(4096, 1024), dtype)
    with use_backend("triton"):
        whole = linear(x, weight)
        for rows in (1, 2, 8, 16, 17, 64, 65, 128, 200, 512, 1030):
            assert_same_bits(linear(x[:rows], weight), whole[:rows], f"{rows} rows of 2,100")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logprobs_have_the_same_bits_for_any_number_of_rows(dtype):
    hidden, head = randn(600, 256).to(DEVICE, dtype), device_weight(randn(50000, 256), dtype)
    targets = torch.randint(0, 50000, (600,), generator=torch.Generator().manual_seed(0), dtype=torch.int32).to(DEVICE)
    with use_backend("triton"):
        logprobs, entropy = token_logprob(hidden, head, targets)
        for rows in (1, 5, 16, 64, 130):
            few = token_logprob(hidden[:rows], head, targets[:rows])
            assert_same_bits(few[0], logprobs[:rows], f"log-probabilities of {rows} rows")
            assert_same_bits(few[1], entropy[:rows], f"entropies of {rows} rows")
