"""Which device a rank's model lies on."""

from __future__ import annotations

import torch

from engine.errors import ConfigError
from engine.kernels.attention import OP_E4M3
from engine.kernels.linear import OP as LINEAR


def choose_device(name: str, dtype: torch.dtype, local_rank: int = 0) -> torch.device:
    """The device that `EngineConfig.device` asks for, for a model of `dtype`: the CPU, or GPU number `local_rank` of
    those that torch sees, which becomes torch's current one.

    "auto" takes a GPU where there is one; a float64 model stays on the CPU, where its definitions run. Raises
    ConfigError where there is no such device.
    """
    wide = dtype == torch.float64
    if name == "cpu" or (name == "auto" and (wide or not torch.cuda.is_available())):
        device = torch.device("cpu")
    else:
        device = _gpu(name, local_rank)
        if wide:
            raise ConfigError(
                'EngineConfig.dtype is "float64", for checks of gradients, and that runs on the CPU; set '
                'EngineConfig.device to "cpu" or "auto"'
            )
        torch.cuda.set_device(device)
    return device


def check_kernels(device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype | None) -> None:
    """Refuses what only torch definitions would compute, slowly and not exactly: a float16 model, and keys and values
    of another dtype than the model's, where there are no kernels for them. Raises ConfigError."""
    where = f"no kernel for that on the {device.type} (python -m engine ops says what there is)"
    if dtype == torch.float16 and LINEAR.chosen(dtype, device.type).name == "torch":
        raise ConfigError(f'EngineConfig.dtype is "float16", and there is {where}; use "bfloat16"')
    if kv_dtype is not None and OP_E4M3.chosen(dtype, device.type).name == "torch":
        raise ConfigError(f'EngineConfig.kv_dtype is "fp8_e4m3", and there is {where}; use "auto"')


def _gpu(name: str, local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        why = (
            "this torch is built without CUDA; install a build with it (pytorch.org)"
            if torch.version.cuda is None
            else "torch sees no GPU; look at nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
        raise ConfigError(f'EngineConfig.device is "{name}", and {why}, or set it to "cpu" or "auto"')
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"this is rank {local_rank} of its machine, which has {count} GPU{'s' * (count > 1)}; start at most one "
            'rank for each (torchrun --nproc-per-node), or set EngineConfig.device to "cpu"'
        )
    return torch.device("cuda", local_rank)
