"""The whole engine on Triton kernels: it samples, scores, learns and saves. Without a GPU the interpreter runs them,
two milliseconds a program, so the model is very small and the prompts are short."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import msgspec
import pytest
import torch
from torch import Tensor

from engine import Completion, Engine, EngineConfig, ModelConfig, Sample, SamplingParams, TrainStats
from engine.kernels.cuda_graph import Captured, CudaGraphs, Forward
from engine.kernels.op import use_backend
from engine.model import Transformer
from engine.sampler import runner
from tests.kernels.triton.cases import DEVICE, needs_triton

pytestmark = needs_triton

MODEL = ModelConfig(
    architecture="Qwen3ForCausalLM",  # it norms queries and keys
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=64,
    initializer_range=0.3,
)
CONFIG = EngineConfig(dtype="float32", device=DEVICE, kv_tokens=128, max_batch_tokens=12, max_seqs=4)
PROMPTS = [[1, 5, 7, 9, 11, 3, 2, 8, 22, 31, 4, 14, 19, 6, 33, 21, 17, 38], [4, 4, 2]]  # one is prefilled in two chunks
PARAMS = SamplingParams(n=2, max_tokens=3, temperature=0.7, seed=5, ignore_eos=True)


@dataclass
class Round:
    """What was sampled, and the same tokens scored and trained on."""

    completions: list[Completion]
    scores: list[Tensor]
    stats: TrainStats

    @property
    def tokens(self) -> list[list[int]]:
        return [completion.token_ids for completion in self.completions]

    def assert_exact(self) -> None:
        assert self.stats.max_abs_logprob_difference == 0.0
        for completion, score, trained in zip(self.completions, self.scores, self.stats.logprobs, strict=True):
            size = len(completion.token_ids)
            assert torch.equal(completion.logprobs, score[-size:])
            assert torch.equal(score[-size:], trained[-size:])


def play(engine: Engine, params: SamplingParams = PARAMS, prompts: list[list[int]] = PROMPTS) -> Round:
    results = engine.generate(prompts, params)
    pairs = [(prompt, each) for prompt, row in zip(prompts, results, strict=True) for each in row]
    scores = engine.score([prompt + each.token_ids for prompt, each in pairs], params.temperature)
    samples = [
        Sample.from_completion(prompt, each, advantage=(-1.0) ** i, temperature=params.temperature)
        for i, (prompt, each) in enumerate(pairs)
    ]
    return Round([each for _, each in pairs], scores, engine.forward_backward(samples, "grpo"))


@dataclass
class Played:
    engine: Engine
    before: Round
    grad_norm: float
    after: Round


def run(device: str = DEVICE) -> Played:
    engine = Engine.from_config(MODEL, msgspec.structs.replace(CONFIG, device=device), seed=1)
    before = play(engine)
    norm = engine.optim_step(1e-2).grad_norm
    return Played(engine, before, norm, play(engine, SamplingParams(max_tokens=2, seed=6, ignore_eos=True)))


@pytest.fixture(scope="module")
def on_triton() -> Played:
    with use_backend("triton"):
        return run()


@pytest.fixture(scope="module")
def on_cpu() -> Played:
    return run("cpu")


def test_sampled_scored_and_trained_logprobs_are_equal_bitwise(on_triton):
    on_triton.before.assert_exact()


def test_they_are_after_an_optimizer_step(on_triton):
    assert on_triton.engine.weight_version == 1
    on_triton.after.assert_exact()


@pytest.mark.parametrize(("dtype", "kv_dtype"), [("float16", "auto"), ("float16", "fp8_e4m3"), ("float32", "fp8_e4m3")])
def test_they_are_in_other_dtypes(dtype, kv_dtype):
    model = msgspec.structs.replace(MODEL, num_hidden_layers=1)
    config = msgspec.structs.replace(CONFIG, dtype=dtype, kv_dtype=kv_dtype)
    with use_backend("triton"):
        engine = Engine.from_config(model, config)
        play(engine, SamplingParams(max_tokens=3, seed=5), PROMPTS[:1]).assert_exact()
    assert (engine.sampler.runner.keys[0].dtype == torch.float8_e4m3fn) == (kv_dtype == "fp8_e4m3")


def test_a_cached_prefix_changes_no_bit(on_triton):
    after, params = on_triton.after, SamplingParams(max_tokens=2, seed=6, ignore_eos=True)
    with use_backend("triton"):
        (again,) = on_triton.engine.generate(PROMPTS[:1], params)[0]
    assert (after.completions[0].num_cached_tokens, again.num_cached_tokens) == (0, 16)
    assert again.token_ids == after.completions[0].token_ids
    assert torch.equal(again.logprobs, after.completions[0].logprobs)


def test_results_are_those_of_the_cpp_kernels_but_for_rounding(on_triton, on_cpu):
    assert on_triton.before.tokens == on_cpu.before.tokens
    for ours, theirs in zip(on_triton.before.scores, on_cpu.before.scores, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    assert on_triton.before.stats.loss == pytest.approx(on_cpu.before.stats.loss, abs=1e-5)
    assert on_triton.grad_norm == pytest.approx(on_cpu.grad_norm, rel=1e-5)
    names = [weight.name for weight in on_triton.engine.model.weights()]
    assert names == [weight.name for weight in on_cpu.engine.model.weights()]
    for ours, theirs in zip(on_triton.engine.model.weights(), on_cpu.engine.model.weights(), strict=True):
        difference = (ours.dense().cpu() - theirs.dense()).abs()
        assert float(difference.mean()) < 1e-5, ours.name  # a rare element has a gradient of either sign
        assert not ours.packed


def test_a_checkpoint_is_read_by_either(on_triton, tmp_path):
    engine = on_triton.engine
    engine.save_pretrained(tmp_path / "model")
    on_cpu = Engine.from_pretrained(tmp_path / "model", EngineConfig(dtype="float32", device="cpu"))
    assert_same_weights(engine, on_cpu)
    on_cpu.save_pretrained(tmp_path / "again")
    with use_backend("triton"):
        assert_same_weights(engine, Engine.from_pretrained(tmp_path / "again", CONFIG))


@pytest.mark.parametrize("wait", [True, False])
def test_a_state_comes_back_whole(on_triton, tmp_path, wait):
    engine = on_triton.engine
    engine.save_state(tmp_path / "state", {"step": 1}, wait=wait)
    engine.wait_for_saves()
    with use_backend("triton"):
        other = Engine.from_config(MODEL, CONFIG, seed=2)
        assert other.load_state(tmp_path / "state") == {"step": 1}
    assert_same_weights(engine, other)
    ours, theirs = engine.trainer.optimizer.state, other.trainer.optimizer.state
    assert ours.keys() == theirs.keys()
    for name, moments in ours.items():
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            assert torch.equal(getattr(moments, kind), getattr(theirs[name], kind)), f"{kind} of {name}"
    for weight, same in zip(engine.trainer.optimizer.weights, other.trainer.optimizer.weights, strict=True):
        assert torch.equal(weight.grad_buffer(), same.grad_buffer()), f"gradient of {weight.name}"
    assert engine.trainer.num_accumulated == other.trainer.num_accumulated == 1


def assert_same_weights(left: Engine, right: Engine) -> None:
    for ours, theirs in zip(left.model.weights(), right.model.weights(), strict=True):
        assert torch.equal(ours.dense().cpu(), theirs.dense().cpu()), ours.name


@pytest.mark.filterwarnings("ignore:overflow")  # in the rows that are nobody's
def test_graphs_with_more_rows_than_the_step_has_change_no_bit(monkeypatch):
    model = msgspec.structs.replace(MODEL, num_hidden_layers=1)
    config = EngineConfig(dtype="float32", device=DEVICE, kv_tokens=64, max_batch_tokens=4, max_seqs=4)
    prompts, params = [[1, 2, 3, 4, 5, 6, 7]], SamplingParams(n=3, max_tokens=2, seed=1, ignore_eos=True)
    if DEVICE == "cpu":  # graphs that launch their kernels one by one, but otherwise are those of a GPU
        monkeypatch.setattr(runner, "Recorded", graphs)
    tokens, logprobs = [], []
    for recordable in (False, True):
        monkeypatch.setattr(Transformer, "recordable", recordable)
        with use_backend("triton"):
            (row,) = Engine.from_config(model, config).generate(prompts, params)
        tokens.append([each.token_ids for each in row])
        logprobs.append(torch.cat([each.logprobs for each in row]))
    assert tokens[0] == tokens[1]
    assert torch.equal(logprobs[0], logprobs[1])


def graphs(forward: partial, max_rows: int) -> CudaGraphs:
    return CudaGraphs(forward, forward.args[0], torch.device("cpu"), max_rows, 4, rerun)


def rerun(forward: Forward, rows: int, pool: object) -> Captured:
    out = forward(rows)  # as a capture does, whatever the batch is

    def replay() -> None:
        out.copy_(forward(rows))

    return replay, out, pool
