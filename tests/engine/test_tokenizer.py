"""Text to ids and back; text that comes token by token."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from engine.errors import CheckpointError, InputError
from engine.tokenizer import REPLACEMENT, StreamDecoder, Tokenizer
from tests.tiny import VOCAB_SIZE, save_tiny_tokenizer

SNAKES = "two snakes 🐍🐍, 12 + 34 = 46 — naïve café 漢字\n"


def byte_fallback_backend():
    """A SentencePiece-like tokenizer: words begin with a mark for the space, unknown characters become bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁aeinosthkw", "▁t", "▁th", "▁the"]
    backend = Backend(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[("▁", "t"), ("▁t", "h"), ("▁th", "e")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    path = tmp_path_factory.mktemp("byte_level")
    save_tiny_tokenizer(path)
    return Tokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def byte_fallback():
    return Tokenizer({"tokenizer.json": byte_fallback_backend().to_str().encode()})


@pytest.fixture(params=["byte_level", "byte_fallback"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def pieces_of(tokenizer, ids, **options):
    decoder = StreamDecoder(tokenizer, **options)
    return [decoder.push([token]) for token in ids] + [decoder.finish()]


def test_text_comes_back(tokenizer):
    assert tokenizer.decode(tokenizer.encode(SNAKES)) == SNAKES


def test_special_tokens_are_known(byte_level):
    assert byte_level.vocab_size == VOCAB_SIZE
    assert byte_level.eos_token == "<|im_end|>" and byte_level.eos_token_ids == (2,)
    assert byte_level.bos_token is None and byte_level.bos_token_id is None and byte_level.pad_token_id == 0
    assert byte_level.token_to_id("<|im_start|>") == 1 and byte_level.token_to_id("<|nothing|>") is None
    assert byte_level.id_to_token(1) == "<|im_start|>" and byte_level.id_to_token(10**6) is None


def test_special_tokens_are_skipped_or_shown(byte_level):
    ids = byte_level.encode("<|im_start|>snakes<|im_end|>")
    assert ids[0] == 1 and ids[-1] == 2
    assert byte_level.decode(ids) == "snakes"
    assert byte_level.decode(ids, skip_special_tokens=False) == "<|im_start|>snakes<|im_end|>"


def test_encoding_equals_that_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    save_tiny_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nthink of the sum <think>" + SNAKES
    assert Tokenizer.from_pretrained(tmp_path).encode(text) == theirs.encode(text)


def test_offsets_name_the_characters(byte_level):
    ids, offsets = byte_level.encode_with_offsets("the snakes<|im_end|>")
    assert offsets[-1] == (10, 20) and ids[-1] == 2


def test_truncation_and_padding_of_the_file_do_not_apply(tmp_path):
    save_tiny_tokenizer(tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer.encode(SNAKES), skip_special_tokens=False) == SNAKES


def test_saving_keeps_every_byte(tmp_path):
    save_tiny_tokenizer(tmp_path / "a", chat_template="{{ messages }}")
    (tmp_path / "a" / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    (tmp_path / "a" / "unrelated.txt").write_text("")
    Tokenizer.from_pretrained(tmp_path / "a").save(tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "b").iterdir())
    assert names == ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    ("file", "content", "templates"),
    [
        ("chat_template.jinja", "own file", {"default": "own file"}),
        ("chat_template.json", '{"chat_template": "as json"}', {"default": "as json"}),
        ("tokenizer_config.json", '{"chat_template": "in config"}', {"default": "in config"}),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]}',
            {"default": "a", "tool_use": "b"},
        ),
        ("tokenizer_config.json", "{}", {}),
    ],
)
def test_chat_template_is_found_wherever_it_is_kept(tmp_path, file, content, templates):
    save_tiny_tokenizer(tmp_path)
    (tmp_path / file).write_text(content)
    assert Tokenizer.from_pretrained(tmp_path).chat_templates == templates


def test_special_tokens_map_serves_where_the_config_is_silent(tmp_path):
    save_tiny_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    assert Tokenizer.from_pretrained(tmp_path).eos_token_ids == (2,)


@given(ids=st.lists(st.integers(0, VOCAB_SIZE + 5), max_size=40))  # a model's vocabulary may be padded
@settings(max_examples=300, deadline=None)
def test_stream_of_any_ids_equals_decoding_them_at_once(byte_level, ids):
    assert "".join(pieces_of(byte_level, ids)) == byte_level.decode(ids)


@given(texts=st.lists(st.text(max_size=6), max_size=6))
@settings(max_examples=200, deadline=None)
def test_stream_across_special_tokens_equals_decoding_them_at_once(byte_fallback, texts):
    end = byte_fallback.token_to_id("</s>")
    ids = [token for text in texts for token in [*byte_fallback.encode(text), end]]
    assert "".join(pieces_of(byte_fallback, ids)) == byte_fallback.decode(ids)


@given(text=st.text(max_size=40))
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_stream_of_a_text_never_shows_half_a_character(kind, text, byte_level, byte_fallback):
    tokenizer = {"byte_level": byte_level, "byte_fallback": byte_fallback}[kind]
    text = text.replace(REPLACEMENT, "")
    ids = tokenizer.encode(text)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_piece_comes_with_the_token_that_completes_it(byte_level):
    ids = byte_level.encode("a🐍b")
    assert pieces_of(byte_level, ids) == ["a", "", "", "", "🐍", "b", ""]


def test_garbage_bytes_do_not_wait_for_ever(byte_level):
    garbage = byte_level.encode("🐍")[1]  # a continuation byte, again and again
    pieces = pieces_of(byte_level, [garbage] * 50)
    assert all(pieces[1:]) and "".join(pieces) == REPLACEMENT * 50


def test_stream_shows_special_tokens_where_asked(byte_level):
    ids = byte_level.encode("a<|im_end|>b")
    assert "".join(pieces_of(byte_level, ids, skip_special_tokens=False)) == "a<|im_end|>b"


def test_several_ids_at_once_equal_one_by_one(tokenizer):
    ids = tokenizer.encode(SNAKES)
    decoder = StreamDecoder(tokenizer)
    assert decoder.push(ids[:7]) + decoder.push([]) + decoder.push(ids[7:]) + decoder.finish() == SNAKES


def test_space_after_a_silent_token_is_kept(byte_fallback):
    ids = [*byte_fallback.encode("the"), byte_fallback.token_to_id("</s>"), *byte_fallback.encode("the")]
    assert pieces_of(byte_fallback, ids) == ["the", "", " the", ""]


@pytest.mark.parametrize(
    ("text", "complaint"), [(b"bytes", "got bytes"), (None, "got NoneType"), ("\ud800", "half of a surrogate pair")]
)
def test_what_is_not_text_is_refused(byte_level, text, complaint):
    with pytest.raises(InputError, match=complaint):
        byte_level.encode(text)


@pytest.mark.parametrize("ids", [[-1], ["a"], [2**40]])
def test_what_is_no_id_is_refused(byte_level, ids):
    with pytest.raises(InputError, match="cannot be decoded"):
        byte_level.decode(ids)


def test_broken_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="is not a directory"):
        Tokenizer.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_pretrained(tmp_path)
    save_tiny_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json holds a JSON list"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [{"eos_token": {}}, {"eos_token": 7}, {"chat_template": [{"name": "default"}]}, {"chat_template": {"default": 1}}],
)
def test_settings_of_the_wrong_kind_are_a_checkpoint_error(tmp_path, settings):
    save_tiny_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="fetch its tokenizer files again"):
        Tokenizer.from_pretrained(tmp_path)


def test_template_file_that_is_not_utf8_is_a_checkpoint_error(tmp_path):
    save_tiny_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="UnicodeDecodeError"):
        Tokenizer.from_pretrained(tmp_path)
