"""The facade: loading, scoring, training, saving, going on."""

import pytest
import torch

from engine import CheckpointError, ConfigError, Engine, EngineConfig, InputError, ModelConfig, Sample, SamplingParams
from tests.tiny import save_hf_tiny, save_tiny_tokenizer, tiny_config

CONFIG = EngineConfig(dtype="float32", kv_tokens=1024, max_batch_tokens=128, max_seqs=16)
GREEDY = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)


def samples(seed: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 300, (n,), generator=generator).tolist() for n in (9, 30)]
    return [Sample(tokens=t, loss_mask=[0] * 3 + [1] * (len(t) - 3)) for t in ids]


def train(engine: Engine, steps: range) -> None:
    for step in steps:
        engine.forward_backward(samples(step), "sft")
        engine.optim_step(learning_rate=1e-2)


def weights(engine: Engine) -> list[torch.Tensor]:
    return [w.data.clone() for w in engine.model.weights()]


def test_from_pretrained_decodes_what_transformers_decodes(tmp_path):
    theirs = save_hf_tiny(tmp_path)
    save_tiny_tokenizer(tmp_path)
    engine = Engine.from_pretrained(tmp_path, CONFIG)
    prompt = engine.tokenizer.encode("think of the sum")
    ours = engine.generate(["think of the sum"], GREEDY)[0][0]
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert ours.token_ids == expected[0, len(prompt) :].tolist()
    assert ours.text == engine.tokenizer.decode(ours.token_ids)


def test_score_is_the_log_softmax_of_transformers(tmp_path):
    theirs = save_hf_tiny(tmp_path, "Qwen3ForCausalLM")
    ids = list(range(5, 60))
    with torch.no_grad():
        logits = theirs(torch.tensor([ids])).logits[0, :-1]
    expected = logits.div(0.7).log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    (score,) = Engine.from_pretrained(tmp_path, CONFIG).score([ids], temperature=0.7)
    torch.testing.assert_close(score, expected, atol=1e-4, rtol=0)


def test_from_config_is_a_function_of_the_seed():
    first, same, other = (Engine.from_config(tiny_config(), CONFIG, seed=s) for s in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(same), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(first), weights(other), strict=True))


def test_training_lowers_the_loss_and_counts_versions():
    engine = Engine.from_config(tiny_config(), CONFIG)
    first = engine.forward_backward(samples(0), "sft").loss
    engine.optim_step(1e-2)
    train(engine, range(0, 1))
    assert engine.forward_backward(samples(0), "sft").loss < first
    assert engine.weight_version == 2


def test_saved_model_loads_with_the_same_bits(tmp_path):
    engine = Engine.from_config(tiny_config(), CONFIG)
    train(engine, range(2))
    engine.save_pretrained(tmp_path / "model")
    again = Engine.from_pretrained(tmp_path / "model", CONFIG)
    assert all(torch.equal(a, b) for a, b in zip(weights(engine), weights(again), strict=True))


def test_saved_state_goes_on_bit_for_bit(tmp_path):
    straight = Engine.from_config(tiny_config(), CONFIG)
    train(straight, range(4))
    stopped = Engine.from_config(tiny_config(), CONFIG)
    train(stopped, range(2))
    stopped.save_state(tmp_path / "state", {"step": 2})
    resumed = Engine.from_config(tiny_config(), CONFIG, seed=5)
    resumed.generate([[1, 2, 3]], GREEDY)
    assert resumed.load_state(tmp_path / "state") == {"step": 2}
    assert resumed.weight_version == 2
    train(resumed, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(weights(straight), weights(resumed), strict=True))


def test_weights_stay_where_they_are():
    engine = Engine.from_config(tiny_config(), CONFIG)
    before = engine.weight_addresses()
    engine.generate([[1, 2, 3]], GREEDY)
    train(engine, range(2))
    engine.generate([[1, 2, 3]], GREEDY)
    assert engine.weight_addresses() == before
    assert sum(size for _, size in before.values()) == engine.model.nbytes()


def test_an_engine_that_only_samples_has_no_optimizer_and_one_that_only_trains_no_pool():
    sampling, training = (Engine.from_config(tiny_config(), CONFIG) for _ in range(2))
    sampling.generate([[1]], GREEDY)
    train(training, range(1))
    assert sampling._trainer is None
    assert training._sampler is None


def test_bad_samples_are_refused_and_the_engine_stays_usable():
    engine = Engine.from_config(tiny_config(), CONFIG)
    with pytest.raises(InputError, match="304"):
        engine.forward_backward([Sample(tokens=[1, 304], loss_mask=[0, 1])], "sft")
    with pytest.raises(ConfigError, match="sft"):
        engine.forward_backward(samples(0), "sfd")
    train(engine, range(1))


def test_config_keys_that_are_unknown_are_refused_with_the_nearest():
    from engine.config import parse

    with pytest.raises(ConfigError, match=r'"page_sise" .*did you mean "page_size"'):
        parse(EngineConfig, {"page_sise": 16})
    with pytest.raises(ConfigError, match="multiple of 16"):
        EngineConfig(page_size=8)
    with pytest.raises(ConfigError, match="LlamaForCausalLM"):
        Engine.from_config(
            ModelConfig(
                architecture="LamaForCausalLM",
                vocab_size=8,
                hidden_size=16,
                head_dim=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=1,
            ),
            CONFIG,
        )


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        Engine.from_pretrained(tmp_path / "nowhere", CONFIG)


def test_what_inference_mode_made_is_written_to_outside_of_it(tmp_path):
    engine = Engine.from_config(tiny_config(), CONFIG)
    with torch.inference_mode():
        assert len(list(engine.stream([[3, 4, 5]], GREEDY))) > 0
        train(engine, range(1))
        engine.score([[3, 4, 5]])
    engine.save_state(tmp_path / "state")
    train(engine, range(1, 2))
    second = engine.generate([[3, 4, 5]], GREEDY)[0][0]
    engine.load_state(tmp_path / "state")
    train(engine, range(1, 2))
    assert engine.generate([[3, 4, 5]], GREEDY)[0][0].token_ids == second.token_ids
