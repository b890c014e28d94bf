"""Tensor parallelism: log-probabilities are the same bits in sampling and training, and gradients those of one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine import Engine, EngineConfig, Sample, SamplingParams
from engine.config import ParallelConfig
from engine.kernels.weight import Weight
from engine.parallel import tensor as tensor_module
from engine.parallel.collectives import all_gather
from engine.parallel.mesh import Mesh, make_mesh
from engine.parallel.tensor import column_linear, row_linear
from tests.parallel.pool import Pool
from tests.tiny import FAMILIES, tiny_config

PROMPT_LENGTHS = (5, 70, 33)


def engine_of(architecture: str, dtype: str, single: bool = False, **parallel: Any) -> Engine:
    config = EngineConfig(
        dtype=dtype, kv_tokens=2048, max_batch_tokens=64, max_seqs=8, threads=1, parallel=ParallelConfig(**parallel)
    )
    mesh = Mesh.single() if single else None
    return Engine.from_config(tiny_config(architecture, initializer_range=0.2), config, mesh=mesh)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 300, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


def sampled_and_trained(architecture: str, dtype: str, tp: int, sequence_parallel: bool) -> dict[str, Any]:
    """What is sampled, scored and seen by the gradient step on this rank."""
    engine = engine_of(architecture, dtype, tp=tp, sequence_parallel=sequence_parallel)
    params = SamplingParams(n=2, max_tokens=12, seed=3, temperature=0.9, top_p=0.95, logprobs=2)
    groups = engine.generate(prompts(), params)
    samples = [
        Sample.from_completion(c.prompt_token_ids, c, 1.0 - i, 0.9) for group in groups for i, c in enumerate(group)
    ]
    scored = engine.score([sample.tokens for sample in samples], 0.9)
    stats = engine.forward_backward(samples, "dapo")
    completions = [c for group in groups for c in group]
    sampled = [c.logprobs for c in completions]
    engine.close()
    return {
        "tokens": [c.token_ids for c in completions],
        "sampled": sampled,
        "top": [c.top_logprobs for c in completions],
        "scored": [s[-len(c.token_ids) :] for s, c in zip(scored, completions, strict=True)],
        "trained": [s[-len(c.token_ids) :] for s, c in zip(stats.logprobs, completions, strict=True)],
        "difference": stats.max_abs_logprob_difference,
    }


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampled_equals_trained_bitwise(pool2: Pool, architecture: str, dtype: str) -> None:
    scattered = pool2.run(sampled_and_trained, architecture, dtype, 2, True)
    whole = pool2.run(sampled_and_trained, architecture, dtype, 2, False)
    for result in scattered + whole:
        assert same(result["sampled"], result["scored"])
        assert same(result["sampled"], result["trained"])
        assert result["difference"] == 0.0
        assert result["tokens"] == scattered[0]["tokens"]
        assert result["top"] == scattered[0]["top"]
        assert same(result["sampled"], scattered[0]["sampled"])


def test_sampled_equals_trained_with_replicated_key_heads(pool4: Pool) -> None:
    """Four ranks, two key/value heads: neighbours hold the same one."""
    results = pool4.run(sampled_and_trained, "Qwen3ForCausalLM", "bfloat16", 4, True)
    for result in results:
        assert same(result["sampled"], result["trained"])
        assert same(result["sampled"], results[0]["sampled"])


def gradients(architecture: str, dtype: str, tp: int, sequence_parallel: bool, **options: Any) -> float:
    """The largest relative difference of a gradient from that of one rank, over every region that this rank holds."""
    generator = torch.Generator().manual_seed(2)
    samples = []
    for length in (40, 7, 21):
        tokens = torch.randint(3, 300, (length,), generator=generator).tolist()
        samples.append(Sample(tokens=tokens, loss_mask=[0, 0, *[1] * (length - 2)]))
    engines = [
        engine_of(architecture, dtype, single, **({} if single else {"tp": tp}), sequence_parallel=sequence_parallel)
        for single in (False, True)
    ]
    for engine in engines:
        engine.model.checkpointing = options.get("checkpointing", False)
        engine.forward_backward(samples, "sft")
    parallel, single = engines
    whole = {part.name: part.weight.grad_buffer()[part.row : part.row + part.shape[0]] for part in single.model.parts()}
    worst = 0.0
    for part in parallel.model.parts():
        expected = whole[part.name][part.region]
        here = part.weight.grad_buffer()[part.row : part.row + part.shape[0]]
        worst = max(worst, float((here - expected).abs().max() / whole[part.name].abs().max()))
    parallel.close()
    return worst


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_gradients_are_those_of_one_rank(pool2: Pool, architecture: str, sequence_parallel: bool) -> None:
    assert max(pool2.run(gradients, architecture, "float64", 2, sequence_parallel)) < 1e-10


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_gradients_with_replicated_key_heads_are_those_of_one_rank(pool4: Pool, sequence_parallel: bool) -> None:
    assert max(pool4.run(gradients, "Qwen3ForCausalLM", "float64", 4, sequence_parallel)) < 1e-10


def test_gradients_with_activation_checkpointing_are_those_of_one_rank(pool2: Pool) -> None:
    assert max(pool2.run(gradients, "LlamaForCausalLM", "float64", 2, True, checkpointing=True)) < 1e-10


def row_sums(rows: int) -> tuple[bool, bool]:
    """Whether a share of the rows has the bits that all rows have, and whether the sum is the fold in rank order."""
    mesh = make_mesh(ParallelConfig(tp=4))
    weight = Weight("w", (48, 32), torch.bfloat16, packed=True)
    generator = torch.Generator().manual_seed(mesh.tp.index)
    weight.load_(torch.randn(48, 32, generator=generator))
    x = torch.randn(rows, 32, generator=generator).bfloat16()
    whole = row_linear(x, weight, None, mesh.tp)
    share = all_gather(row_linear(x, weight, None, mesh.tp, rows=rows), mesh.tp).flatten(0, 1)[:rows]
    partial = all_gather(tensor_module.linear(x, weight, out_dtype=torch.float32), mesh.tp)
    folded = ((partial[0] + partial[1]) + partial[2]) + partial[3]
    mesh.close()
    return torch.equal(whole, share), torch.equal(whole, folded.bfloat16())


@pytest.mark.parametrize("rows", [1, 3, 41, 900])
def test_a_share_of_the_rows_has_the_bits_of_all(pool4: Pool, rows: int) -> None:
    assert pool4.run(row_sums, rows) == [(True, True)] * 4


def overlap() -> list[str]:
    """What happens in the backward of a column-parallel matmul, in order."""
    mesh = make_mesh(ParallelConfig(tp=2))
    weight = Weight("w", (32, 64), torch.float32, packed=True)
    events: list[str] = []
    real_sum, real_weight = tensor_module._start_sum, tensor_module.linear_grad_weight_

    def start_sum(*args: Any) -> Any:
        events.append("sum of dx starts")
        pending = real_sum(*args)
        wait = pending.wait
        pending.wait = lambda: (events.append("sum of dx is waited for"), wait())[1]
        return pending

    def grad_weight(*args: Any) -> None:
        events.append("dW")
        real_weight(*args)

    tensor_module._start_sum, tensor_module.linear_grad_weight_ = start_sum, grad_weight
    try:
        x = torch.randn(8, 64, requires_grad=True)
        column_linear(x, weight, None, mesh.tp).sum().backward()
    finally:
        tensor_module._start_sum, tensor_module.linear_grad_weight_ = real_sum, real_weight
    mesh.close()
    return events


def test_the_sum_of_the_inputs_gradient_travels_while_the_weights_is_computed(pool2: Pool) -> None:
    assert pool2.run(overlap)[0] == ["sum of dx starts", "dW", "sum of dx is waited for"]
