"""Hugging Face directories in and out; the model here is as small as one can be."""

import json
import os
import resource
import weakref

import msgspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engine.checkpoint import load_weights, read_config, save_pretrained
from engine.errors import CheckpointError, ConfigError
from engine.model import Transformer
from engine.tokenizer import Tokenizer
from tests.tiny import FAMILIES, save_hf_tiny, save_tiny_tokenizer, tiny_config


def make_model(dtype=torch.float32, tied=False):
    """One layer, nine words; every weight at zero, norms too."""
    sizes = {"hidden_size": 4, "vocab_size": 9, "intermediate_size": 7, "num_hidden_layers": 1}
    config = tiny_config(**sizes, num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=tied)
    return Transformer(config, dtype)


def tensors_of(model):
    return {p.name: p.weight.dense(p.row, p.shape[0]) for p in model.parts()}


def random_tensors(dtype=torch.float32, tied=False):
    generator = torch.Generator().manual_seed(0)
    return {p.name: torch.randn(p.shape, generator=generator).to(dtype) for p in make_model(tied=tied).parts()}


def filled(dtype=torch.float32, tied=False):
    model = make_model(dtype, tied)
    for part in model.parts():
        part.weight.load_(random_tensors(dtype, tied)[part.name], row=part.row)
    return model


def save_sharded(path, tensors):
    """Every tensor in a shard of its own, and the index."""
    names = {name: f"model-{i + 1:05d}-of-{len(tensors):05d}.safetensors" for i, name in enumerate(tensors)}
    for name, file in names.items():
        save_file({name: tensors[name]}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return names


def assert_holds(model, tensors):
    for name, value in tensors_of(model).items():
        assert torch.equal(value, tensors[name].to(value.dtype)), name


def test_one_file_fills_every_row(tmp_path):
    save_file(random_tensors(), tmp_path / "model.safetensors")
    model = make_model()
    load_weights(tmp_path, model)
    assert_holds(model, random_tensors())


def test_shards_fill_every_row(tmp_path):
    save_sharded(tmp_path, random_tensors())
    model = make_model()
    load_weights(tmp_path, model)
    assert_holds(model, random_tensors())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 200, 1])
def test_saved_weights_load_back_bit_for_bit(tmp_path, dtype, tied, max_shard_bytes):
    saved = filled(dtype, tied)
    save_pretrained(tmp_path / "out", saved, max_shard_bytes=max_shard_bytes)
    loaded = make_model(dtype, tied)
    load_weights(tmp_path / "out", loaded)
    assert_holds(loaded, tensors_of(saved))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_file_is_what_the_safetensors_library_reads(tmp_path, dtype):
    saved = filled(dtype)
    save_pretrained(tmp_path / "out", saved)
    theirs = load_file(tmp_path / "out" / "model.safetensors")
    assert theirs.keys() == tensors_of(saved).keys()
    assert all(torch.equal(theirs[name], value) for name, value in tensors_of(saved).items())
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_shards_keep_to_the_limit_and_the_index_names_them_all(tmp_path):
    saved = filled()
    save_pretrained(tmp_path / "out", saved, max_shard_bytes=300)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    sizes = {
        name: sum(t.nbytes for t in load_file(tmp_path / "out" / name).values())
        for name in index["weight_map"].values()
    }
    assert len(sizes) > 1 and max(sizes.values()) <= 300
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert index["weight_map"].keys() == tensors_of(saved).keys()


def test_saving_takes_the_tokenizer_along_and_writes_the_configs(tmp_path):
    save_tiny_tokenizer(tmp_path / "tokenizer")
    model = filled()
    save_pretrained(tmp_path / "out", model, Tokenizer.from_pretrained(tmp_path / "tokenizer"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "tokenizer" / name).read_bytes()
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    again = read_config(tmp_path / "out")
    assert again.rope_scaling == model.config.rope_scaling and again.architecture == "LlamaForCausalLM"


def test_repeated_embedding_of_a_tied_model_is_taken(tmp_path):
    tensors = random_tensors(tied=True)
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors"
    )
    model = make_model(tied=True)
    load_weights(tmp_path, model)
    assert_holds(model, tensors)


def test_tied_model_with_another_head_is_refused(tmp_path):
    tensors = random_tensors(tied=True)
    save_file(tensors | {"lm_head.weight": torch.zeros(9, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="set tie_word_embeddings to false"):
        load_weights(tmp_path, make_model(tied=True))


def test_missing_head_of_an_untied_model_says_what_to_set(tmp_path):
    save_file(random_tensors(tied=True), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight; .*set tie_word_embeddings to true"):
        load_weights(tmp_path, make_model())


def test_huge_finite_weights_are_taken(tmp_path):
    tensors = random_tensors()
    tensors["model.norm.weight"][:] = 3e38
    save_file(tensors, tmp_path / "model.safetensors")
    model = make_model()
    load_weights(tmp_path, model)
    assert_holds(model, tensors)


def test_rotary_buffer_of_old_checkpoints_is_ignored(tmp_path):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    tensors, model = random_tensors(), make_model()
    save_file(tensors | extra, tmp_path / "model.safetensors")
    load_weights(tmp_path, model)
    assert_holds(model, tensors)


def damage_nan(path):
    tensors = random_tensors()
    tensors["model.layers.0.mlp.up_proj.weight"][2, 1] = float("nan")
    save_file(tensors, path / "model.safetensors")


def damage_infinity(path):
    tensors = random_tensors()
    tensors["model.norm.weight"][3] = float("inf")
    save_file(tensors, path / "model.safetensors")


def damage_opposite_infinities(path):
    tensors = random_tensors()
    tensors["model.norm.weight"][:2] = torch.tensor([float("inf"), float("-inf")])
    save_file(tensors, path / "model.safetensors")


def damage_missing_tensor(path):
    tensors = random_tensors()
    del tensors["model.norm.weight"]
    save_file(tensors, path / "model.safetensors")


def damage_unexpected_tensor(path):
    save_file(random_tensors() | {"model.layers.0.self_attn.q_proj.bias": torch.ones(4)}, path / "model.safetensors")


def damage_shape(path):
    save_file(random_tensors() | {"model.norm.weight": torch.ones(5)}, path / "model.safetensors")


def damage_dtype(path):
    save_file(random_tensors() | {"model.norm.weight": torch.ones(4, dtype=torch.int8)}, path / "model.safetensors")


def damage_truncated(path):
    save_file(random_tensors(), path / "model.safetensors")
    os.truncate(path / "model.safetensors", (path / "model.safetensors").stat().st_size - 1)


def damage_truncated_header(path):
    save_file(random_tensors(), path / "model.safetensors")
    os.truncate(path / "model.safetensors", 40)


def damage_empty(path):
    (path / "model.safetensors").touch()


def damage_pointer(path):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"
    (path / "model.safetensors").write_text(text)


def damage_header(path):
    (path / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"not json")


def damage_header_entry(path):
    text = json.dumps({"model.norm.weight": {"shape": [4], "data_offsets": [0, 16]}}).encode()
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))


def damage_empty_index(path):
    (path / "model.safetensors.index.json").write_text('{"weight_map": []}')


def damage_missing_shard(path):
    names = save_sharded(path, random_tensors())
    (path / names["model.norm.weight"]).unlink()


def damage_truncated_shard(path):
    names = save_sharded(path, random_tensors())
    os.truncate(path / names["model.norm.weight"], 70)


def damage_index(path):
    (path / "model.safetensors.index.json").write_text("{")


def damage_twice(path):
    save_sharded(path, random_tensors())
    (path / "model.safetensors.index.json").unlink()
    save_file({"model.norm.weight": torch.ones(4)}, path / "stray.safetensors")


def damage_pickle(path):
    (path / "pytorch_model.bin").touch()


def damage_nothing_there(path):
    (path / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            damage_nan,
            r"model\.safetensors: model\.layers\.0\.mlp\.up_proj\.weight holds NaN.* in 1 of 28 .*\(nan\) at \[2, 1\]",
        ),
        (damage_infinity, r"model\.norm\.weight holds NaN or infinity in 1 of 4 .*\(inf\) at \[3\]"),
        (damage_opposite_infinities, r"model\.norm\.weight holds NaN or infinity in 2 of 4 .*\(inf\) at \[0\]"),
        (damage_missing_tensor, r"lacks model\.norm\.weight; it is incomplete"),
        (damage_unexpected_tensor, r"holds model\.layers\.0\.self_attn\.q_proj\.bias, which.*correct config\.json"),
        (damage_shape, r"model\.norm\.weight has shape \(5,\), expected \(4,\)"),
        (damage_dtype, r"model\.norm\.weight is I8, expected one of"),
        (damage_truncated, r"is truncated: [\d,]+ bytes, expected [\d,]+; fetch it again"),
        (damage_truncated_header, "end inside its header"),
        (damage_empty, "end inside its header"),
        (damage_pointer, "end inside its header"),
        (damage_header, "header cannot be read"),
        (damage_header_entry, "header cannot be read"),
        (damage_empty_index, "names no files"),
        (damage_missing_shard, r"lacks model-00011-of-00012\.safetensors, which model.*index\.json names"),
        (damage_truncated_shard, r"model-00011-of-00012\.safetensors is truncated"),
        (damage_index, "cannot be read as JSON"),
        (damage_twice, "is in both"),
        (damage_pickle, "is a pickle"),
        (damage_nothing_there, r"has no \.safetensors file; expected model\.safetensors"),
    ],
)
def test_damaged_checkpoint_is_named(tmp_path, damage, words):
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        load_weights(tmp_path, make_model())


@pytest.mark.parametrize("damage", [damage_missing_tensor, damage_shape, damage_truncated_shard, damage_missing_shard])
def test_damage_is_found_before_the_first_weight_is_written(tmp_path, damage):
    damage(tmp_path)
    model = make_model()
    with pytest.raises(CheckpointError):
        load_weights(tmp_path, model)
    assert all((value == 0.0).all() for value in tensors_of(model).values())


def test_only_one_tensor_is_held_beside_the_model(tmp_path, monkeypatch):
    """Each tensor of the file is dead before the next one is read."""
    from engine import checkpoint

    save_file(random_tensors(), tmp_path / "model.safetensors")
    read: list[weakref.ref] = []

    class Watched:
        def __init__(self, *arguments, **options):
            self.file = safe_open(*arguments, **options)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def get_slice(self, name):
            self.slice = self.file.get_slice(name)
            return self

        def __getitem__(self, index):
            assert not any(reference() is not None for reference in read), "a tensor outlived the reading of the next"
            value = self.slice[index]
            read.append(weakref.ref(value))
            return value

    monkeypatch.setattr(checkpoint, "safe_open", Watched)
    load_weights(tmp_path, make_model())
    assert len(read) == 12


def test_disk_that_refuses_leaves_the_old_checkpoint(tmp_path):
    """A file-size limit stands in for a full disk: the write itself fails, as it would there."""
    old = filled()
    save_pretrained(tmp_path / "out", old)
    new = make_model()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*What was there is intact"):
            save_pretrained(tmp_path / "out", new)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["out"]
    load_weights(tmp_path / "out", new)
    assert_holds(new, tensors_of(old))


def test_model_that_diverged_does_not_replace_a_good_checkpoint(tmp_path):
    old, bad = filled(), filled()
    save_pretrained(tmp_path / "out", old)
    bad.parts()[0].weight.load_(torch.tensor([[0.0, 0.0, float("nan"), 0.0]]), row=4)
    with pytest.raises(
        CheckpointError, match=r"the model in memory: model\.embed_tokens\.weight .*\(nan\) at \[4, 2\]"
    ):
        save_pretrained(tmp_path / "out", bad)
    load_weights(tmp_path / "out", bad)
    assert_holds(bad, tensors_of(old))


def test_saving_over_foreign_files_is_refused(tmp_path):
    (tmp_path / "notes.md").write_text("mine")
    model = filled()
    with pytest.raises(CheckpointError, match=r"notes\.md"):
        save_pretrained(tmp_path, model)


def test_checkpoint_killed_between_renames_is_read(tmp_path):
    model = filled()
    save_pretrained(tmp_path / "out", model)
    (tmp_path / "out").rename(tmp_path / ".out.old")
    assert read_config(tmp_path / "out").hidden_size == 4
    load_weights(tmp_path / "out", make_model())


@pytest.mark.parametrize("family", FAMILIES)
def test_config_saved_by_transformers_is_read(tmp_path, family):
    pytest.importorskip("transformers")
    save_hf_tiny(tmp_path, family)
    config, expected = read_config(tmp_path), tiny_config(family)
    for key in ("architecture", "head_dim", "rope_scaling", "sliding_window", "rms_norm_eps", "vocab_size"):
        assert getattr(config, key) == getattr(expected, key), key


@pytest.mark.parametrize(
    ("ours", "generation", "both"),
    [(2, [5, 2, 6], (2, 5, 6)), (2, 2, (2,)), (None, 5, (5,)), ([2, 3], None, (2, 3)), (None, None, ())],
)
def test_end_of_sequence_ids_are_those_of_both_files(tmp_path, ours, generation, both):
    model = filled()
    model.config = msgspec.structs.replace(model.config, eos_token_id=ours)
    save_pretrained(tmp_path / "out", model)
    (tmp_path / "out" / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert read_config(tmp_path / "out").eos_token_ids == both


def test_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="is not a directory"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_config(tmp_path)


def test_config_error_names_the_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(ConfigError, match=r"config\.json: unknown architecture"):
        read_config(tmp_path)
