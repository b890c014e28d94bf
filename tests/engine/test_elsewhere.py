"""An engine whose tensors lie where the CPU cannot reach them, as on a GPU: the "meta" device stands for one. torch
refuses to mix its tensors with the CPU's, so what runs through here leaves nothing behind; and each read is counted,
because on a GPU the host waits in it. Kernels do not run, and what is read is zeros."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.fx.experimental._config
from torch import Tensor

import engine.kernels.triton
from engine import Engine, EngineConfig, Sample, SamplingParams
from engine.kernels.op import triton_missing, use_backend
from engine.losses import LOSSES, LossBatch
from engine.model import Transformer
from tests.tiny import tiny_config

pytestmark = pytest.mark.skipif(bool(triton_missing()), reason=triton_missing() or "installed")
ELSEWHERE = torch.device("meta")
PROMPTS = [[3, 4, 5], [7, 8, 9, 10] * 8]


@pytest.fixture
def reads(monkeypatch) -> Iterator[list[str]]:
    """Engines are made elsewhere; the list is of what the host reads from there."""
    seen: list[str] = []

    def reading(name: str) -> Callable[..., Any]:
        on_cpu = getattr(Tensor, name)

        def read(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
            away = name != "to" or arguments[:1] == ("cpu",)
            if not (tensor.is_meta and away):
                return on_cpu(tensor, *arguments, **options)
            seen.append(name)
            return True if name == "__bool__" else on_cpu(torch.zeros_like(tensor, device="cpu"), *arguments, **options)

        return read

    for name in ("cpu", "to", "item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(Tensor, name, reading(name))
    for module in pkgutil.iter_modules(engine.kernels.triton.__path__):
        loaded = import_module(f"engine.kernels.triton.{module.name}")
        if module.name != "launch" and hasattr(loaded, "launch"):
            monkeypatch.setattr(loaded, "launch", lambda *_, **__: None)
    monkeypatch.setattr("engine.engine.choose_device", lambda *_: ELSEWHERE)
    monkeypatch.setattr(Transformer, "recordable", False)  # there is nothing to capture graphs with
    with torch.fx.experimental._config.patch(meta_nonzero_assume_all_nonzero=True):
        yield seen


def make(**config: Any) -> Engine:
    sizes = {"kv_tokens": 512, "max_batch_tokens": 16, "max_seqs": 8, **config}
    with use_backend("triton"):
        return Engine.from_config(tiny_config("Qwen3ForCausalLM", attention_bias=True), EngineConfig(**sizes))


def sample(advantage: float = 1.0) -> Sample:
    return Sample([3, 4, 5, 6], [0, 1, 1, 1], advantage, [0.0, -1.0, -2.0, -3.0], [0.0, -2.0, -1.0, -1.0], 0.7)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_all_tensors_of_the_model_and_its_pages_lie_there(reads, dtype):
    engine = make(dtype=dtype)
    with use_backend("triton"):
        tensors = [weight.data for weight in engine.model.weights()]
        tensors += [*engine.sampler.runner.keys, *engine.sampler.runner.values]
        engine.trainer.optimizer.allocate()
        tensors += [weight.grad_buffer() for weight in engine.model.weights()]
        for moments in engine.trainer.optimizer.state.values():
            tensors += [moments.master, moments.exp_avg, moments.exp_avg_sq]
    assert {tensor.device for tensor in tensors} == {ELSEWHERE}


def test_a_step_of_sampling_reads_once(reads):
    engine = make()
    params = SamplingParams(n=3, max_tokens=5, top_p=0.9, ignore_eos=True)
    with use_backend("triton"):
        for _ in range(2):
            engine.generate(PROMPTS, params)
    assert 0 < len(reads) <= engine.sampler.stats.steps
    assert set(reads) == {"cpu"}


def test_a_micro_batch_reads_once(reads):
    engine = make(train_batch_tokens=4)
    with use_backend("triton"):
        stats = engine.forward_backward([sample(), sample(), sample()], "dapo")
    assert reads == ["cpu"] * int(stats.metrics["micro_batches"])


def test_an_optimizer_step_reads_once(reads):
    engine = make()
    with use_backend("triton"):
        engine.forward_backward([sample()], "sft")
        del reads[:]
        engine.optim_step(1e-3)
    assert reads == ["tolist"]


def test_alternatives_are_read_from_there(reads):
    with use_backend("triton"):
        (row,) = make().generate([[3, 4]], SamplingParams(max_tokens=3, logprobs=2, ignore_eos=True))
    assert [len(choices) for choices in row[0].top_logprobs] == [1, 1, 1]  # the zeros that are read are one token


def test_scores_come_from_there(reads):
    with use_backend("triton"):
        (scores,) = make().score([[3, 4, 5, 6]], temperature=0.7)
    assert scores.is_cpu
    assert scores.shape == (3,)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_is_computed_there(reads, loss):
    engine = make()
    with use_backend("triton"):
        stats = engine.forward_backward([sample(), sample(-1.0)], loss)
        engine.optim_step(1e-3)
    assert all(logprobs.is_cpu for logprobs in stats.logprobs)


def test_a_loss_of_ones_own_sees_tensors_of_that_device(reads):
    devices: set[torch.device] = set()

    def loss(batch: LossBatch) -> Tensor:
        devices.update(value.device for value in vars(batch).values() if isinstance(value, Tensor))
        return -batch.logprobs * batch.advantages

    with use_backend("triton"):
        make().forward_backward([sample()], loss)
    assert devices == {ELSEWHERE}


def test_recomputed_activations_stay_there(reads):
    with use_backend("triton"):
        engine = make(activation_checkpointing=True)
        stats = engine.forward_backward([sample()], "sft")
    assert {weight.grad_buffer().device for weight in engine.model.weights()} == {ELSEWHERE}
    assert all(logprobs.is_cpu for logprobs in stats.logprobs)


@pytest.mark.parametrize("wait", [True, False])
def test_checkpoints_and_states_go_out_and_come_back(reads, tmp_path, wait):
    engine = make()
    with use_backend("triton"):
        engine.forward_backward([sample()], "sft")
        engine.optim_step(1e-3)
        engine.forward_backward([sample()], "sft")
        engine.save_state(tmp_path / "state", wait=wait)
        engine.load_state(tmp_path / "state")
        engine.save_pretrained(tmp_path / "model")
        again = Engine.from_pretrained(tmp_path / "model", EngineConfig())
    assert again.model.embed.data.device == ELSEWHERE


def test_gradients_in_lanes_stay_there(reads):
    engine = make()
    with use_backend("triton"):
        engine.trainer.gradient_lanes = 2
        engine.forward_backward([sample(), sample(), sample()], "gspo")
        engine.optim_step(1e-3)
    assert {weight.grad_buffer().device for weight in engine.trainer.optimizer.weights} == {ELSEWHERE}
