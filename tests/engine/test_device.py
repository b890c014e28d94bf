"""Which device an engine takes, and that its tensors lie there. No GPU is needed: torch is told that there are some."""

from __future__ import annotations

import pytest
import torch

from engine import Engine, EngineConfig
from engine.errors import ConfigError, InputError
from engine.kernels import op
from engine.kernels.checks import address
from engine.kernels.device import choose_device
from engine.kernels.memory import unowned, upload, zeros
from engine.kernels.op import use_backend
from engine.kernels.weight import Weight
from engine.model import Transformer
from tests.tiny import tiny_config

CPU = torch.device("cpu")


@pytest.fixture
def two_gpus(monkeypatch) -> list[torch.device]:
    """torch sees two GPUs; the list is of those that became the current one."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.fixture
def no_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def no_interpreter(monkeypatch) -> None:
    """Triton takes no CPU tensors."""
    monkeypatch.setattr(op, "_triton_without_gpu", False)


def test_a_device_that_there_is_not_is_refused_with_those_that_there_are():
    with pytest.raises(ConfigError, match=r'device is "cude".*did you mean "?cuda"?.*auto, cpu, cuda'):
        EngineConfig(device="cude")
    with pytest.raises(ConfigError, match=r"LOCAL_RANK"):
        EngineConfig(device="cuda:1")


def test_auto_takes_the_gpu_of_the_rank(two_gpus):
    assert choose_device("auto", torch.bfloat16, local_rank=1) == torch.device("cuda:1")
    assert two_gpus == [torch.device("cuda:1")]


def test_auto_takes_the_cpu_without_a_gpu(no_gpu):
    assert choose_device("auto", torch.float32) == CPU


def test_cpu_leaves_gpus_alone(two_gpus):
    assert choose_device("cpu", torch.bfloat16) == CPU
    assert two_gpus == []


@pytest.mark.parametrize(("version", "remedy"), [(None, r"build with it"), ("13.0", r"CUDA_VISIBLE_DEVICES")])
def test_cuda_without_a_gpu_names_the_remedy(no_gpu, monkeypatch, version, remedy):
    monkeypatch.setattr(torch.version, "cuda", version)
    with pytest.raises(ConfigError, match=rf'device is "cuda".*{remedy}.*"cpu" or "auto"'):
        Engine.from_config(tiny_config(), EngineConfig(device="cuda"))


def test_more_ranks_than_gpus_are_refused(two_gpus):
    with pytest.raises(ConfigError, match=r"rank 2 of its machine, which has 2 GPUs"):
        choose_device("auto", torch.bfloat16, local_rank=2)


def test_float64_stays_on_the_cpu(two_gpus):
    assert choose_device("auto", torch.float64) == CPU
    with pytest.raises(ConfigError, match=r'"float64".*runs on the CPU'):
        choose_device("cuda", torch.float64)


def test_float16_needs_a_kernel(no_interpreter):
    with pytest.raises(ConfigError, match=r'"float16", and there is no kernel for that on the cpu .*; use "bfloat16"'):
        Engine.from_config(tiny_config(), EngineConfig(device="cpu", dtype="float16"))


def test_keys_and_values_in_fp8_need_a_kernel(no_interpreter):
    with pytest.raises(ConfigError, match=r'kv_dtype is "fp8_e4m3", and there is no kernel .* on the cpu .*"auto"'):
        Engine.from_config(tiny_config(), EngineConfig(device="cpu", kv_dtype="fp8_e4m3"))


def test_an_unknown_kv_dtype_is_refused():
    with pytest.raises(ConfigError, match=r'kv_dtype is "fp8".*"?fp8_e4m3"?'):
        EngineConfig(kv_dtype="fp8")


def test_what_is_made_lies_on_the_device_around_it():
    with torch.device("meta"):
        model = Transformer(tiny_config(), torch.float32)
        assert zeros((3,), torch.float32).is_meta
        assert zeros((3,), torch.float32, CPU).is_cpu
    assert model.device == torch.device("meta")
    assert all(weight.data.is_meta and weight.grad_buffer().is_meta for weight in model.weights())
    assert model.layers[0].attention.rope.is_meta


def test_weights_for_other_kernels_than_the_cpp_ones_are_dense():
    with torch.device("meta"), use_backend("triton"):
        weight = Weight("w", (40, 24), torch.float32, packed=True)
    assert (weight.packed, tuple(weight.data.shape)) == (False, (40, 24))


def test_a_cpp_kernel_refuses_an_address_of_another_device():
    with pytest.raises(InputError, match=r"on meta; all that it reads lies on the cpu"):
        address(torch.empty(3, device="meta"))


def test_what_lies_on_the_cpu_is_uploaded_there_without_a_copy():
    x = torch.arange(3)
    assert upload(x, CPU) is x
    assert upload(x, torch.device("meta")).is_meta


def test_memory_of_another_device_is_not_read_through_its_address():
    x = torch.empty(3, device="meta")
    assert unowned(x) is x
