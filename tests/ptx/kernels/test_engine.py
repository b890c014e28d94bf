"""The whole engine in bfloat16 on what the compiler makes for Hopper: what is sampled, scored and trained has one set
of bits, before a step of the optimizer and after it."""

from __future__ import annotations

import msgspec

from engine import Engine, SamplingParams
from tests.kernels.triton.test_engine import CONFIG, MODEL, PROMPTS, play
from tests.ptx.launches import simulated


def test_sampled_scored_and_trained_logprobs_are_equal_bitwise():
    model = msgspec.structs.replace(MODEL, hidden_size=64, head_dim=64, num_hidden_layers=1)
    config = msgspec.structs.replace(CONFIG, dtype="bfloat16")
    with simulated() as launches:
        engine = Engine.from_config(model, config, seed=1)
        play(engine).assert_exact()
        assert engine.optim_step(1e-2).grad_norm > 0
        play(engine, SamplingParams(max_tokens=2, seed=6, ignore_eos=True), PROMPTS[:1]).assert_exact()
    ran = {launch.name for launch in launches}
    assert ran >= {"_attend", "_multiply", "_forward", "_sample", "_tile_statistics", "_grad_keys", "_step"}
