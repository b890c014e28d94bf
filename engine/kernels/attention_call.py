"""What attention is called with, as its backends get it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from engine.kernels.attention_pages import AttentionSpec
from engine.kernels.attention_plan import AttentionPlan
from engine.kernels.weight import Weight


class AttentionCall(NamedTuple):
    """The arguments of `engine.kernels.attention.attention`, which has checked them. A backend has

        forward(call, want_lse) -> (out [T, H Dh], lse: fp32 [T, H], or None where it is not wanted)
        backward(call, d_out, out, lse) -> (gradient of qkv, gradient of kv or None)

    whose backward adds the gradients of the norms to their weights', and is asked for calls without pages alone.
    """

    qkv: Tensor
    spec: AttentionSpec
    rope: Tensor
    plan: AttentionPlan
    keys: Tensor | None = None
    values: Tensor | None = None
    q_norm: Weight | None = None
    k_norm: Weight | None = None
    kv: Tensor | None = None
