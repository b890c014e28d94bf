"""Text to ids and back with the checkpoint's own `tokenizer.json`; text that comes token by token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from engine.errors import CheckpointError, InputError

# Everything of a Hugging Face directory that belongs to the tokenizer; `save` writes what was read, byte for byte.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
REPLACEMENT = "\ufffd"  # what decoding gives for bytes that are not UTF-8, or not yet


class Tokenizer:
    """A tokenizer as its checkpoint defines it.

    `bos_token`, `eos_token` and `pad_token` are strings or None. `chat_templates` are Jinja2 sources by name
    ("default", for some checkpoints also "tool_use"); empty when the checkpoint ships none.
    """

    def __init__(self, files: dict[str, bytes], where: str = "tokenizer") -> None:
        """`files` are the contents of TOKENIZER_FILES by name; "tokenizer.json" must be one. Raises CheckpointError."""
        self._files = files
        try:
            self._backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        except KeyError:
            raise CheckpointError(f"{where} has no tokenizer.json; convert its tokenizer to the fast format") from None
        except Exception as error:  # the library raises its base class for whatever it cannot parse
            raise CheckpointError(f"{where}/tokenizer.json cannot be read ({error}); fetch it again") from None
        self._backend.no_truncation()
        self._backend.no_padding()
        settings = {**_json(files, "special_tokens_map.json", where), **_json(files, "tokenizer_config.json", where)}
        try:
            self.bos_token = _content(settings.get("bos_token"))
            self.eos_token = _content(settings.get("eos_token"))
            self.pad_token = _content(settings.get("pad_token"))
            self.chat_templates = _chat_templates(files, settings, where)
        except (LookupError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{where}: the special tokens or the chat template are not written as Hugging Face writes them "
                f"({type(error).__name__}: {error}); fetch its tokenizer files again"
            ) from None
        self.special_tokens = frozenset(
            token.content for token in self._backend.get_added_tokens_decoder().values() if token.special
        )
        self.uses_byte_fallback = "ByteFallback" in json.dumps(json.loads(files["tokenizer.json"]).get("decoder"))

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Tokenizer:
        """The tokenizer of a Hugging Face directory. Raises CheckpointError."""
        path = Path(directory)
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a directory; download the checkpoint and give the path to it")
        try:
            files = {name: (path / name).read_bytes() for name in TOKENIZER_FILES if (path / name).is_file()}
        except OSError as error:
            raise CheckpointError(
                f"{error.filename} cannot be read ({error.strerror}); check its permissions"
            ) from None
        return cls(files, str(path))

    def save(self, directory: str | Path) -> None:
        """Writes the files it was read from, unchanged. Raises CheckpointError."""
        path = Path(directory)
        try:
            path.mkdir(parents=True, exist_ok=True)
            for name, content in self._files.items():
                (path / name).write_bytes(content)
        except OSError as error:
            raise CheckpointError(f"cannot write the tokenizer to {path}: {error}; choose another directory") from error

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`. Special tokens written out in the text become their ids; `add_special_tokens` adds those that
        the checkpoint puts around a text (a BOS, where it has one). Raises InputError for what is not text."""
        return self._encode(text, add_special_tokens).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, nothing added, and the characters [begin, end) that each stands for. Raises InputError."""
        encoding = self._encode(text, False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 come out as U+FFFD. Ids that the tokenizer lacks (a model's
        vocabulary may be padded beyond it) say nothing. Raises InputError for negative ids."""
        try:
            return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError):
            bad = next((i for i in ids if not isinstance(i, int) or not 0 <= i < 2**32), None)
            raise InputError(f"token id {bad!r} cannot be decoded; ids are integers from 0 up") from None

    @property
    def vocab_size(self) -> int:
        """How many tokens it has, added ones included; a model's own vocabulary may be larger."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token_id(self) -> int | None:
        return self._id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        return self._id(self.eos_token)

    @property
    def pad_token_id(self) -> int | None:
        return self._id(self.pad_token)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-sequence id as a tuple, empty where there is none. The model's configuration may know more."""
        token = self.eos_token_id
        return () if token is None else (token,)

    def token_to_id(self, token: str) -> int | None:
        """None where there is no such token."""
        return self._backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it (bytes in the tokenizer's own alphabet), None where there is none."""
        return self._backend.id_to_token(token_id)

    def _encode(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        if not isinstance(text, str):
            raise InputError(f"expected text, got {type(text).__name__}; pass a str")
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens)
        except (UnicodeError, TypeError):
            raise InputError("the text holds half of a surrogate pair, which is no character; remove it") from None

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._backend.token_to_id(token)


class StreamDecoder:
    """Text as its tokens come: the pieces that `push` returns, then that of `finish`, joined are `decode` of all ids.

    A piece never ends inside a UTF-8 character: bytes wait until their character is whole, or cannot become whole.
    (One exception to the first sentence: where bytes are a fallback, `decode` shows a run of them that is not UTF-8 as
    U+FFFD throughout, and the stream may have sent whole characters of that run before.)
    Each step decodes one token of context and what still waits, so the work per token does not grow.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []  # one token of context, then those that came since
        self._sent = 0  # characters of the window's text that were returned before

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids settle; may be empty."""
        return "".join(self._push(token) for token in ids)

    def finish(self) -> str:
        """What still waits, as U+FFFD where it is half a character. The decoder starts anew."""
        rest = self._decode(self._window)[self._sent :]
        self._window, self._sent = [], 0
        return rest

    def _push(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        settled = len(text) - self._waiting(text)
        piece = text[self._sent : settled]
        self._sent = max(self._sent, settled)
        if settled == len(text) and self._is_context(token):
            self._window = [token]
            self._sent = len(self._decode(self._window))
        return piece

    def _waiting(self, text: str) -> int:
        """Characters at the end that more tokens may still change.

        Where tokens are bytes, an unfinished character is exactly one U+FFFD. Where bytes are a fallback, a run of them
        is decoded as one and is U+FFFD throughout until it is whole.
        """
        if not text.endswith(REPLACEMENT):
            return 0
        return len(text) - len(text.rstrip(REPLACEMENT)) if self._tokenizer.uses_byte_fallback else 1

    def _is_context(self, token: int) -> bool:
        """Whether what follows can be decoded after this token alone. Not after one that is silent (the next would
        lose its leading space as at the start of a text), nor inside a run of fallback bytes."""
        if self._tokenizer.uses_byte_fallback:
            name = self._tokenizer.id_to_token(token) or ""
            if name.startswith("<0x") and name.endswith(">"):
                return False
        return bool(self._decode([token]))

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, self._skip)


def _json(files: dict[str, bytes], name: str, where: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        data = json.loads(files[name])
    except ValueError as error:
        raise CheckpointError(f"{where}/{name} is not JSON ({error}); fetch it again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{where}/{name} holds a JSON {type(data).__name__}, expected an object; fetch it again")
    return data


def _content(token: str | dict[str, Any] | None) -> str | None:
    """A special token is written as its text, or as an object with the text in it."""
    text = token["content"] if isinstance(token, dict) else token
    if not isinstance(text, str | None):
        raise TypeError(f"a special token is {text!r}")
    return text


def _chat_templates(files: dict[str, bytes], settings: dict[str, Any], where: str) -> dict[str, str]:
    """A file of its own wins over the one in tokenizer_config.json, which may be one template or several by name."""
    if "chat_template.jinja" in files:
        return {"default": files["chat_template.jinja"].decode()}
    found = _json(files, "chat_template.json", where).get("chat_template") or settings.get("chat_template") or {}
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    templates = {"default": found} if isinstance(found, str) else dict(found)
    if not all(isinstance(source, str) for source in templates.values()):
        raise TypeError("a chat template is not text")
    return templates
