"""Rotary position embedding (arXiv 2104.09864): its table, and its definition in torch.

Queries and keys are rotated inside the attention kernel (csrc/cpu/rope.inl); nothing else reads positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.errors import ConfigError, nearest

Scaling = dict[str, Any]


def rope_table(
    head_dim: int, theta: float, scaling: Scaling | None, max_positions: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """cos and sin of every angle, fp32 [max_positions, head_dim]: a row is [head_dim/2] cos, then [head_dim/2] sin.

    `scaling` is Hugging Face's `rope_scaling`: rope_type "default", "linear" (arXiv 2306.15595), "llama3" (Llama 3.1's
    model card) or "yarn" (arXiv 2309.00071); frequencies and angles are computed in fp32, in the order in which
    transformers does. A `dtype` of float64 widens the fp32 table: the model is the same function, computed more
    precisely. Raises ConfigError for another rope_type or a missing number.
    """
    if head_dim < 2 or head_dim % 2:
        raise ConfigError(f"head_dim is {head_dim}; rotary embedding turns pairs, so it must be even")
    scaling = scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in _KINDS:
        known = ", ".join(_KINDS)
        raise ConfigError(f'rope_type is "{kind}"{nearest(str(kind), list(_KINDS))}; the engine has {known}')
    frequency = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    frequency, amplitude = _KINDS[kind](frequency, scaling, theta, max_positions)
    angle = torch.arange(max_positions).float()[:, None] * frequency[None]  # [P, Dh/2]
    return torch.cat([angle.cos() * amplitude, angle.sin() * amplitude], 1).to(dtype)


def apply_rope(x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """Rotates x [T, heads, Dh] to its positions [T]: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) on halves of Dh."""
    cos, sin = table[positions.long()][:, None].to(x.dtype).chunk(2, -1)
    x1, x2 = x.chunk(2, -1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)


def _number(scaling: Scaling, key: str, default: float | None = None) -> float:
    value = scaling.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f'rope_scaling has {key}={value!r}; rope_type "{scaling.get("rope_type")}" needs a number')
    return value


def _default(frequency: Tensor, scaling: Scaling, theta: float, max_positions: int) -> tuple[Tensor, float]:
    return frequency, 1.0


def _linear(frequency: Tensor, scaling: Scaling, theta: float, max_positions: int) -> tuple[Tensor, float]:
    return frequency / _number(scaling, "factor"), 1.0


def _llama3(frequency: Tensor, scaling: Scaling, theta: float, max_positions: int) -> tuple[Tensor, float]:
    """Long waves are stretched by `factor`, short ones left alone, those between blended."""
    factor = _number(scaling, "factor")
    low, high = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
    trained = _number(scaling, "original_max_position_embeddings")
    wavelength = 2 * math.pi / frequency
    stretched = torch.where(wavelength > trained / low, frequency / factor, frequency)
    share = (trained / wavelength - low) / (high - low)
    blended = (1 - share) * stretched / factor + share * stretched
    between = ~(wavelength < trained / high) & ~(wavelength > trained / low)
    return torch.where(between, blended, stretched), 1.0


def _yarn(frequency: Tensor, scaling: Scaling, theta: float, max_positions: int) -> tuple[Tensor, float]:
    """Frequencies that turn often within the trained context are kept, slow ones interpolated, a ramp between."""
    trained = _number(scaling, "original_max_position_embeddings", max_positions)
    factor = _number(scaling, "factor", max_positions / trained)
    head_dim = 2 * frequency.shape[0]

    def dimension(turns: float) -> float:
        return head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(_number(scaling, "beta_fast", 32)), dimension(_number(scaling, "beta_slow", 1))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    ramp = (torch.arange(head_dim // 2).float() - first) / ((last - first) or 0.001)
    kept = 1 - ramp.clamp(0, 1)

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    amplitude = scaling.get("attention_factor")
    if amplitude is None and scaling.get("mscale") and scaling.get("mscale_all_dim"):
        amplitude = magnitude(_number(scaling, "mscale")) / magnitude(_number(scaling, "mscale_all_dim"))
    elif amplitude is None:
        amplitude = magnitude(1.0)
    return frequency / factor * (1 - kept) + frequency * kept, float(amplitude)


_KINDS: dict[str, Callable[[Tensor, Scaling, float, int], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
