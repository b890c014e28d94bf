"""Logits equal those of transformers, for random models of every family that transformers itself has saved."""

import pytest
import torch

from engine import Engine, EngineConfig, SamplingParams
from engine.batch import TokenBatch
from engine.checkpoint import load_weights, read_config, save_pretrained
from engine.kernels.linear import linear
from engine.model import Transformer
from tests.tiny import VOCAB_SIZE, save_hf_tiny

transformers = pytest.importorskip("transformers")

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
CASES = {
    "llama3_scaling": ("LlamaForCausalLM", {}),
    "llama_tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama_biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama_one_kv_head": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
    "llama_many_kv_heads": ("LlamaForCausalLM", {"num_key_value_heads": 4}),
    "llama_linear_scaling": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0}},
    ),
    "llama_yarn": ("LlamaForCausalLM", {"rope_parameters": YARN}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2_tied": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2_window": ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}),
    "qwen3_free_head_dim": ("Qwen3ForCausalLM", {}),
    "qwen3_biases_tied": ("Qwen3ForCausalLM", {"attention_bias": True, "tie_word_embeddings": True}),
    "mistral_window": ("MistralForCausalLM", {}),
    "mistral_without_window": ("MistralForCausalLM", {"sliding_window": None}),
    "seed_oss": ("SeedOssForCausalLM", {}),
    "seed_oss_output_bias": ("SeedOssForCausalLM", {"attention_out_bias": True, "mlp_bias": True}),
}
SAVED = ["llama_tied", "llama_biases", "llama_yarn", "qwen2_window", "qwen3_biases_tied", "mistral_window", "seed_oss"]
ENGINE = ["llama3_scaling", "llama_tied", "qwen2", "qwen3_free_head_dim", "mistral_window", "seed_oss"]
TOLERANCE = 1e-4  # logits of these models are a few units wide


def sequences():
    """Lengths below, at and beyond a window and a page; packed, none may see another."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in (41, 1, 16, 7, 33)]


def logits_of(model):
    """Ours: one packed forward, [sum of lengths, V]."""
    with torch.no_grad():
        return linear(model.forward(TokenBatch.packed(sequences())), model.head, out_dtype=torch.float32)


def logits_of_transformers(model):
    """Theirs: one sequence at a time, so that no padding has a say."""
    with torch.no_grad():
        return torch.cat([model(torch.tensor([ids])).logits[0] for ids in sequences()])


def load(directory, dtype=torch.float32):
    model = Transformer(read_config(directory), dtype)
    load_weights(directory, model)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_of_a_packed_batch_equal_those_of_transformers(tmp_path, case):
    architecture, overrides = CASES[case]
    expected = logits_of_transformers(save_hf_tiny(tmp_path, architecture, **overrides))
    assert expected.std() > 0.3, "logits this flat would hide a difference"
    torch.testing.assert_close(logits_of(load(tmp_path)), expected, rtol=0.0, atol=TOLERANCE)


@pytest.mark.parametrize("case", SAVED)
def test_transformers_computes_the_same_from_what_we_save(tmp_path, case):
    architecture, overrides = CASES[case]
    expected = logits_of_transformers(save_hf_tiny(tmp_path / "theirs", architecture, **overrides))
    save_pretrained(tmp_path / "ours", load(tmp_path / "theirs"), max_shard_bytes=50_000)
    kind = transformers.AutoModelForCausalLM
    again, info = kind.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again).__name__ == architecture
    assert torch.equal(logits_of_transformers(again.eval()), expected)


@pytest.mark.parametrize("case", ENGINE)
def test_decoding_through_the_kv_pool_agrees_with_transformers(tmp_path, case):
    """Log-probabilities of sampled tokens (chunked prefill, then decode), and those of `score`, against theirs."""
    architecture, overrides = CASES[case]
    theirs = save_hf_tiny(tmp_path, architecture, **overrides)
    engine = Engine.from_pretrained(
        tmp_path, EngineConfig(dtype="float32", kv_tokens=1024, max_batch_tokens=24, threads=1)
    )
    params = SamplingParams(max_tokens=24, seed=3, ignore_eos=True)
    for (completion,) in engine.generate(sequences(), params):
        whole = completion.prompt_token_ids + completion.token_ids
        with torch.no_grad():
            logits = theirs(torch.tensor([whole])).logits[0, :-1].float()
        expected = logits.log_softmax(-1).gather(1, torch.tensor(whole[1:])[:, None])[:, 0]
        begin = len(completion.prompt_token_ids) - 1
        torch.testing.assert_close(completion.logprobs, expected[begin:], rtol=0.0, atol=TOLERANCE)
        torch.testing.assert_close(engine.score([whole])[0], expected, rtol=0.0, atol=TOLERANCE)


def test_shards_of_transformers_load_as_one_model(tmp_path):
    one = save_hf_tiny(tmp_path, "Qwen3ForCausalLM", max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    torch.testing.assert_close(logits_of(load(tmp_path)), logits_of_transformers(one), rtol=0.0, atol=TOLERANCE)


def test_bfloat16_checkpoint_saves_back_bit_for_bit(tmp_path):
    from safetensors.torch import load_file

    save_hf_tiny(tmp_path / "theirs", dtype=torch.bfloat16)
    save_pretrained(tmp_path / "ours", load(tmp_path / "theirs", torch.bfloat16))
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == torch.bfloat16 and torch.equal(ours[name], theirs[name]) for name in theirs)
