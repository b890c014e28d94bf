"""A rank may have no row of a micro-batch: every op then gives nothing forward and leaves gradients as they were."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.kernels.embedding import embedding
from engine.kernels.linear import linear
from engine.kernels.op import cpu_missing, use_backend
from engine.kernels.rms_norm import add_rms_norm, rms_norm
from engine.kernels.swiglu import swiglu
from engine.kernels.token_logprob import token_logprob
from engine.kernels.weight import Weight

NOBODY = torch.empty(0, dtype=torch.int32)
OPS: dict[str, Callable[[Tensor, dict[str, Weight]], Tensor]] = {
    "linear": lambda x, w: linear(x, w["matrix"], w["bias"]),
    "rms_norm": lambda x, w: rms_norm(x, w["norm"], 1e-5),
    "add_rms_norm": lambda x, w: add_rms_norm(x, x, w["norm"], 1e-5)[1],
    "swiglu": lambda x, w: swiglu(x),
    "embedding": lambda x, w: embedding(NOBODY, w["table"]),
    "token_logprob": lambda x, w: token_logprob(x, w["matrix"], NOBODY)[0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("name", list(OPS))
def test_an_op_without_rows_leaves_gradients_as_they_were(name: str, backend: str, dtype: torch.dtype) -> None:
    if backend == "cpu" and cpu_missing():
        pytest.skip(cpu_missing())
    weights = {
        "matrix": Weight("matrix", (96, 64), dtype, packed=True),
        "table": Weight("table", (96, 64), dtype, packed=False),
        "bias": Weight("bias", (96,), dtype, packed=False),
        "norm": Weight("norm", (64,), dtype, packed=False),
    }
    for weight in weights.values():
        weight.load_(torch.randn(weight.shape))
        weight.grad_buffer().fill_(3.0)
    x = torch.empty(0, 64, dtype=dtype, requires_grad=True)
    with use_backend(backend):
        out = OPS[name](x, weights)
        out.sum().backward()
    assert out.shape[0] == 0
    assert name == "embedding" or (x.grad is not None and x.grad.shape == (0, 64))
    assert all(torch.equal(w.grad_buffer(), torch.full(w.shape, 3.0)) for w in weights.values())
