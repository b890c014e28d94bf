"""Which device a rank's model lies on."""

from __future__ import annotations

import torch

from engine.errors import ConfigError
from engine.kernels.linear import OP as LINEAR


def choose_device(name: str, dtype: torch.dtype, local_rank: int = 0) -> torch.device:
    """The device that `EngineConfig.device` asks for, for a model of `dtype`: the CPU, or GPU number `local_rank` of
    those that torch sees, which becomes torch's current one.

    "auto" takes a GPU where there is one; a float64 model stays on the CPU, where its definitions run. Raises
    ConfigError where there is no such device, or no kernel for the dtype on it.
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
    if dtype == torch.float16 and LINEAR.chosen(dtype, device.type).name == "torch":
        raise ConfigError(
            f'EngineConfig.dtype is "float16", which no kernel computes in on the {device.type}; use "bfloat16" there '
            "(python -m engine ops says what computes in what)"
        )
    return device


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
