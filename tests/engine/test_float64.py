"""float64: gradients equal those of transformers and of finite differences to many more digits than float32 has."""

from __future__ import annotations

import math

import pytest
import torch

from engine import Engine, EngineConfig, Sample, SamplingParams
from engine.errors import ConfigError
from engine.kernels.adamw import adamw_
from engine.kernels.op import OPS, cpu_missing, use_backend
from engine.kernels.shard_logprob import fold_statistics, shard_logprob_backward, shard_statistics, shard_targets
from engine.kernels.table import rows as op_rows
from engine.kernels.token_logprob import logits_logprob
from engine.kernels.weight import Weight
from engine.losses import LossConfig
from tests.tiny import VOCAB_SIZE, save_hf_tiny, tiny_config

TOLERANCE = 1e-10
CONFIG = EngineConfig(dtype="float64", kv_tokens=1024, max_batch_tokens=24, max_seqs=8, train_batch_tokens=64)
# Each family, and what is easily lost: a tied head, every bias, a window, both kinds of RoPE scaling, one K/V head.
CASES = {
    "llama3_scaling": ("LlamaForCausalLM", {}),
    "llama_tied_biases": ("LlamaForCausalLM", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama_one_kv_head": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
    "llama_yarn": (
        "LlamaForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "rope_theta": 10000.0,
            }
        },
    ),
    "qwen2_window": ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "mistral_window": ("MistralForCausalLM", {}),
    "seed_oss": ("SeedOssForCausalLM", {"attention_out_bias": True, "mlp_bias": True}),
}


def samples_of(lengths: tuple[int, ...] = (41, 7, 33), temperature: float = 1.0) -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    return [
        Sample(
            tokens=torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist(),
            loss_mask=[0, 0, *[1] * (length - 2)],
            advantages=0.7 * (-1.0) ** index,
            temperature=temperature,
        )
        for index, length in enumerate(lengths)
    ]


def in_float64(model):
    """Transformers' own model, without its roundings to float32: its norm always makes them, its eager softmax too."""
    model.set_attn_implementation("sdpa")
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, m=module: (
                m.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + m.variance_epsilon)
            )
    return model


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_of_transformers(tmp_path, case):
    pytest.importorskip("transformers")
    architecture, overrides = CASES[case]
    theirs = in_float64(save_hf_tiny(tmp_path, architecture, dtype=torch.float64, **overrides))
    samples = samples_of()
    loss = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        tokens = torch.tensor(sample.tokens)
        logp = theirs(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        loss = loss - sample.advantages * logp[1:].sum()
    loss = loss / sum(sum(sample.loss_mask) for sample in samples)
    assert loss.dtype == torch.float64
    loss.backward()

    engine = Engine.from_pretrained(tmp_path, CONFIG)
    stats = engine.forward_backward(samples, "reinforce")
    assert abs(stats.loss - loss.item()) < TOLERANCE * abs(loss.item())
    expected = dict(theirs.named_parameters())
    compared = set()
    for part in engine.model.parts():
        gradient = part.weight.grad_buffer()[part.row : part.row + part.shape[0]]
        assert gradient.dtype == torch.float64
        reference = expected[part.name].grad
        error = float((gradient - reference).abs().max() / reference.abs().max())
        assert error < TOLERANCE, f"{part.name}: relative error {error:.1e}"
        compared.add(part.name)
    assert compared == set(expected)


def test_gradients_equal_finite_differences():
    """Of a loss with an entropy term and a KL term at a temperature, along random directions through all weights."""
    engine = Engine.from_config(tiny_config("Qwen3ForCausalLM", initializer_range=0.1), CONFIG)
    samples = samples_of(temperature=0.7)
    for sample, scored in zip(samples, engine.score([s.tokens for s in samples], 0.7), strict=True):
        sample.ref_logprobs = [0.0, *(scored - 0.3).tolist()]
    loss = LossConfig(name="reinforce", entropy_coefficient=0.3, kl_coefficient=0.2)
    weights = engine.model.weights()
    engine.forward_backward(samples, loss)
    gradients = [weight.grad_buffer().clone() for weight in weights]
    step = 1e-5
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        directions = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in weights]
        slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
        values = []
        for sign in (1.0, -2.0):  # to +step, then to -step
            for weight, direction in zip(weights, directions, strict=True):
                weight.load_(weight.dense() + sign * step * direction)
            values.append(engine.forward_backward(samples, loss).loss)
        for weight, direction in zip(weights, directions, strict=True):
            weight.load_(weight.dense() + step * direction)
        measured = (values[0] - values[1]) / (2 * step)
        assert measured == pytest.approx(slope, rel=1e-6), f"direction {seed}"


def test_micro_batches_change_no_digit_of_the_gradient():
    gradients = []
    for train_batch_tokens in (16, 4096):
        config = EngineConfig(dtype="float64", train_batch_tokens=train_batch_tokens)
        engine = Engine.from_config(tiny_config(initializer_range=0.1), config)
        engine.forward_backward(samples_of(), "sft")
        gradients.append(torch.cat([weight.grad_buffer().flatten() for weight in engine.model.weights()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0.0, atol=1e-14)


def test_what_is_sampled_is_scored_to_float32_precision():
    """Tokens come through chunked prefill and the KV pool, scores from one packed forward."""
    engine = Engine.from_config(tiny_config("MistralForCausalLM", initializer_range=0.2), CONFIG)
    prompts = [sample.tokens for sample in samples_of()]
    params = SamplingParams(n=2, max_tokens=16, seed=5, temperature=0.8, top_p=0.9, logprobs=3, ignore_eos=True)
    for completion in [c for row in engine.generate(prompts, params) for c in row]:
        (scored,) = engine.score([completion.prompt_token_ids + completion.token_ids], 0.8)
        assert scored.dtype == torch.float64
        assert completion.logprobs.dtype == torch.float32
        torch.testing.assert_close(
            completion.logprobs.double(), scored[-len(completion.token_ids) :], rtol=0.0, atol=1e-5
        )
        stats = engine.forward_backward([Sample.from_completion(completion.prompt_token_ids, completion, 1.0, 0.8)])
        assert stats.logprobs[0].dtype == torch.float64
        assert stats.max_abs_logprob_difference < 1e-5


def test_weights_are_those_of_the_float32_model():
    configs = {dtype: EngineConfig(dtype=dtype) for dtype in ("float32", "float64")}
    narrow, wide = (Engine.from_config(tiny_config(), config, seed=3) for config in configs.values())
    for one, other in zip(narrow.model.weights(), wide.model.weights(), strict=True):
        assert other.data.dtype == torch.float64
        assert torch.equal(one.dense(dtype=torch.float64), other.dense())


def test_a_checkpoint_keeps_every_bit(tmp_path):
    engine = Engine.from_config(tiny_config(initializer_range=0.1), CONFIG)
    engine.forward_backward(samples_of(), "sft")
    engine.optim_step(1e-3)
    engine.save_pretrained(tmp_path / "model")
    engine.save_state(tmp_path / "state")
    loaded = Engine.from_pretrained(tmp_path / "model", CONFIG)
    loaded.save_state(tmp_path / "state before the first step")
    restored, fresh = (Engine.from_config(tiny_config(), CONFIG) for _ in range(2))
    restored.load_state(tmp_path / "state")
    fresh.load_state(tmp_path / "state before the first step")
    for other in (loaded, restored, fresh):
        for one, two in zip(engine.model.weights(), other.model.weights(), strict=True):
            assert not torch.equal(one.data, one.data.float().double()), "these weights would survive float32"
            assert torch.equal(one.data, two.data), one.name
    for run in (engine, restored):
        run.forward_backward(samples_of(), "sft")
        run.optim_step(1e-3)
    for one, two in zip(engine.model.weights(), restored.model.weights(), strict=True):
        assert torch.equal(one.data, two.data), one.name


def test_adamw_equals_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((33, 17), generator=generator, dtype=torch.float64)
    weight = Weight("w", (33, 17), torch.float64, packed=True)
    weight.load_(values)
    master, exp_avg, exp_avg_sq = weight.dense(), torch.zeros_like(values), torch.zeros_like(values)
    parameter = values.clone().requires_grad_()
    theirs = torch.optim.AdamW([parameter], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 6):
        gradient = torch.randn((33, 17), generator=generator, dtype=torch.float64)
        weight.grad_buffer().copy_(gradient)
        parameter.grad = gradient
        theirs.step()
        rest = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
        adamw_(weight, master, exp_avg, exp_avg_sq, learning_rate=1e-2, step=step, **rest)
    torch.testing.assert_close(weight.dense(), parameter.detach(), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_vocabulary_shards_equal_the_whole_row(shards):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn((9, 301), generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 301, (9,), generator=generator, dtype=torch.int32)
    inverse = torch.rand(9, generator=generator) + 0.5
    g, h = torch.randn((2, 9), generator=generator, dtype=torch.float64)
    spans = [(301 * i // shards, 301 * (i + 1) // shards) for i in range(shards)]
    parts = [(logits[:, a:b].contiguous(), shard_targets(targets, a, b - a)) for a, b in spans]
    statistics = torch.stack([shard_statistics(part, here[:, None], inverse) for part, here in parts])
    logprobs, entropy, stats = fold_statistics(statistics, torch.float64)
    expected = logits_logprob(logits, targets, inverse)
    torch.testing.assert_close(logprobs[:, 0], expected[0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(entropy, expected[1], rtol=1e-13, atol=1e-13)
    leaf = logits.clone().requires_grad_()
    logp = torch.log_softmax(leaf * inverse.double()[:, None], -1)
    (logp.gather(1, targets.long()[:, None])[:, 0] @ g - (logp * logp.exp()).sum(-1) @ h).backward()
    pieces = [shard_logprob_backward(part, here, inverse, stats, entropy, g, h, torch.float64) for part, here in parts]
    torch.testing.assert_close(torch.cat(pieces, 1), leaf.grad, rtol=0.0, atol=1e-13)


MODEL_OPS = ("adamw", "attention", "embedding", "linear", "rms_norm", "shard_logprob", "swiglu", "token_logprob")


@pytest.mark.parametrize("op", MODEL_OPS)
def test_no_kernel_takes_float64_and_the_reason_is_listed(op):
    reasons = {row.backend: row.why_not for row in op_rows(torch.float64) if row.op == op}
    assert OPS[op].chosen(torch.float64).name == "torch"
    assert reasons["torch"] == ""
    assert cpu_missing() or "not in float64" in reasons["cpu"]


@pytest.mark.skipif(bool(cpu_missing()), reason="no kernels are built")
@pytest.mark.parametrize("op", MODEL_OPS)
def test_the_choice_for_other_dtypes_is_still_the_kernel(op):
    for dtype in (None, torch.float32, torch.bfloat16):
        assert OPS[op].chosen(dtype).name == "cpu"


@pytest.mark.skipif(bool(cpu_missing()), reason="no kernels are built")
def test_kernels_that_are_asked_for_by_name_refuse_float64():
    engine = Engine.from_config(tiny_config(), CONFIG)
    with use_backend("cpu"), pytest.raises(ConfigError, match="float32 and bfloat16, not in float64"):
        engine.score([[1, 2, 3]])


def test_an_optimizer_step_lowers_the_loss():
    engine = Engine.from_config(tiny_config(initializer_range=0.1), CONFIG)
    losses = []
    for _ in range(4):
        losses.append(engine.forward_backward(samples_of(), "sft").loss)
        assert math.isfinite(engine.optim_step(3e-3).grad_norm)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.5
