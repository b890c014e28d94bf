"""RoPE tables against transformers' own, number by number."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.errors import ConfigError
from engine.kernels.rope import apply_rope, rope_table

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 128}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 2.5},
        LLAMA3,
        YARN,
        {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
        {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
        {**YARN, "attention_factor": 1.25},
    ],
)
def test_table_equals_transformers(scaling: dict[str, Any] | None) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theta, positions = 10000.0, 1024
    config = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=positions,
        rope_parameters={"rope_type": "default", **(scaling or {}), "rope_theta": theta},
    )  # fmt: skip
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(positions)[None])
    expected = torch.cat([cos[0, :, :32], sin[0, :, :32]], 1)
    torch.testing.assert_close(rope_table(64, theta, scaling, positions), expected, rtol=0, atol=1e-6)


def test_the_older_name_of_the_key_is_read() -> None:
    old = {"type": "linear", "factor": 2.0}
    new = {"rope_type": "linear", "factor": 2.0}
    assert torch.equal(rope_table(32, 1e4, old, 16), rope_table(32, 1e4, new, 16))


def test_a_rotation_keeps_lengths_and_depends_on_distance_alone() -> None:
    table = rope_table(32, 10000.0, None, 200).double()
    x, y = torch.randn(1, 1, 32).double(), torch.randn(1, 1, 32).double()

    def turned(vector: torch.Tensor, position: int) -> torch.Tensor:
        return apply_rope(vector, table, torch.tensor([position]))

    torch.testing.assert_close(turned(x, 150).norm(), x.norm(), rtol=1e-6, atol=0)
    near, far = (turned(x, 7) * turned(y, 3)).sum(), (turned(x, 107) * turned(y, 103)).sum()
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "default, linear, llama3, yarn"),
        ({"rope_type": "lama3"}, 'did you mean "llama3"'),
        ({"rope_type": "linear"}, "factor=None"),
        ({**LLAMA3, "low_freq_factor": "one"}, "low_freq_factor='one'"),
    ],
)
def test_a_scaling_that_cannot_be_used_is_refused(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rope_table(64, 10000.0, scaling, 16)


def test_an_odd_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="head_dim is 15"):
        rope_table(15, 10000.0, None, 16)
