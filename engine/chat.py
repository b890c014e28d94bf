"""Messages to text and ids with the checkpoint's own chat template: the thinking switch, tools, loss masks
(Hermes 4, arXiv 2508.18255). The way back, from text to thought, answer and tool calls, is `response.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import ConfigError, InputError
from engine.response import MalformedToolCall, Response, ToolCall, parse_response
from engine.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "MalformedToolCall", "Message", "Response", "ToolCall", "parse_response"]

Message = Mapping[str, Any]

THINKING_PROMPT = (
    "You are a deep thinking AI, you may use extremely long chains of thought to deeply consider the problem and "
    "deliberate with yourself via systematic reasoning processes to help come to a correct solution prior to "
    "answering. You should enclose your thoughts and internal monologue inside <think> </think> tags, and then provide "
    "your solution or response to the problem."
)
TOOLS_PROMPT = (
    "You can call functions. Their JSON schemas are inside <tools> </tools> tags. To call one, write a JSON object "
    "with its name and arguments inside <tool_call> </tool_call> tags; the result comes back inside <tool_response> "
    "</tool_response> tags."
)

# The body that both built-in formats share. `open(role)` and `close()` are theirs. A thought belongs to the turn that
# it led to: it is dropped once a later user message has come, unless `keep_cots`.
_BODY = """
{%- set ns = namespace(system='', last_user=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last_user = loop.index0 %}{% endif %}
{%- endfor %}
{%- set start = 0 %}
{%- if messages and messages[0].role == 'system' %}
    {%- set ns.system = messages[0].content %}
    {%- set start = 1 %}
{%- endif %}
{%- if thinking and thinking_prompt not in ns.system %}
    {%- set ns.system = thinking_prompt + ('\n\n' + ns.system if ns.system else '') %}
{%- endif %}
{%- if tools %}
    {%- set ns.system = (ns.system + '\n\n' if ns.system else '') + tools_prompt + '\n<tools>' %}
    {%- for tool in tools %}{% set ns.system = ns.system + '\n' + (tool | tojson) %}{% endfor %}
    {%- set ns.system = ns.system + '\n</tools>' %}
{%- endif %}
{%- if ns.system or start %}{{ open('system') + ns.system + close() }}{% endif %}
{%- for message in messages[start:] %}
    {%- set content = message.content or '' %}
    {%- if message.role == 'assistant' %}
        {%- if message.reasoning_content %}
            {%- set content = '<think>\n' + message.reasoning_content + '\n</think>\n' + content %}
        {%- endif %}
        {%- if not keep_cots and loop.index0 + start < ns.last_user and '</think>' in content %}
            {%- set content = (content.split('</think>') | last).lstrip() %}
        {%- endif %}
        {{- open('assistant') + content }}
        {%- for call in message.tool_calls or [] %}
            {%- set function = call.function or call %}
            {%- set arguments = function.arguments %}
            {{- '\n' if content or not loop.first }}
            {{- '<tool_call>\n{"name": ' + (function.name | tojson) + ', "arguments": ' }}
            {{- (arguments if arguments is string else arguments | tojson) + '}\n</tool_call>' }}
        {%- endfor %}
        {{- close() }}
    {%- elif message.role == 'tool' %}
        {{- open('tool') + '<tool_response>\n' + content + '\n</tool_response>' + close() }}
    {%- elif message.role == 'system' or message.role == 'user' %}
        {{- open(message.role) + content + close() }}
    {%- else %}
        {{- raise_exception('unknown role "' + message.role + '"; the roles are system, user, assistant and tool') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ open('assistant') }}{% endif %}
"""
CHATML_TEMPLATE = (
    "{%- macro open(role) %}{{ '<|im_start|>' + role + '\\n' }}{% endmacro %}"
    "{%- macro close() %}{{ '<|im_end|>\\n' }}{% endmacro %}" + _BODY
)
LLAMA3_TEMPLATE = (
    "{%- macro open(role) %}{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}{% endmacro %}"
    "{%- macro close() %}{{ '<|eot_id|>' }}{% endmacro %}{{ bos_token }}" + _BODY
)


class ChatTemplate:
    """Renders conversations for one tokenizer.

    A message is a mapping with "role" and "content" (text, or what the template takes), for an assistant also
    "reasoning_content" and "tool_calls". The template runs in Jinja2's sandbox and sees plain data only.
    """

    def __init__(self, tokenizer: Tokenizer, source: str | None = None) -> None:
        """`source` is a Jinja2 template; by default the checkpoint's own, and where it ships none a built-in one
        (Llama 3 headers or ChatML, whichever the vocabulary has the tokens of).

        Raises ConfigError when there is none to choose, or when it is not Jinja2.
        """
        self.tokenizer = tokenizer
        sources = dict(tokenizer.chat_templates) if source is None else {"default": source}
        if "default" not in sources:
            sources["default"] = next(iter(sources.values()), None) or _built_in(tokenizer)
        self._templates = {name: _compile(text) for name, text in sources.items()}

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> ChatTemplate:
        """The template of a Hugging Face directory. Raises CheckpointError, ConfigError."""
        return cls(Tokenizer.from_pretrained(directory))

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = False,
        keep_cots: bool = False,
        **arguments: Any,
    ) -> str:
        """The conversation as text.

        `thinking` asks for a reasoning trace: as the template's own switch (`thinking`, or `enable_thinking`), and for
        a template that has neither by Hermes' system prompt. `keep_cots` keeps the thoughts of earlier turns.
        `add_generation_prompt` opens the assistant's turn. Other arguments go to the template as they are.
        Raises InputError for messages that are not such, and for whatever the template refuses.
        """
        template = self._templates["tool_use" if tools and "tool_use" in self._templates else "default"]
        plain = _plain_messages(messages)
        if "enable_thinking" in template.variables:
            arguments.setdefault("enable_thinking", thinking)
        if thinking and not template.variables & {"thinking", "enable_thinking"}:
            plain = _with_thinking_prompt(plain)
        try:
            return template.compiled.render(
                messages=plain,
                tools=_plain(list(tools)) if tools else None,
                add_generation_prompt=add_generation_prompt,
                thinking=thinking,
                keep_cots=keep_cots,
                bos_token=self.tokenizer.bos_token or "",
                eos_token=self.tokenizer.eos_token or "",
                thinking_prompt=THINKING_PROMPT,
                tools_prompt=TOOLS_PROMPT,
                **{key: _plain(value) for key, value in arguments.items()},
            )
        except Exception as error:  # the template is the checkpoint's program: whatever it raises, it refuses the input
            raise InputError(f"the chat template refuses these messages: {error}") from error

    def encode(self, messages: Sequence[Message], **options: Any) -> list[int]:
        """`render` as ids; the template itself writes BOS where the model wants one. Raises InputError."""
        return self.tokenizer.encode(self.render(messages, **options), add_special_tokens=False)

    def render_with_mask(
        self, messages: Sequence[Message], *, last_turn_only: bool = False, **options: Any
    ) -> tuple[list[int], list[int]]:
        """(ids, mask) of a whole conversation for supervised training; takes the options of `render`.

        mask is 1 on what the assistant writes: the content of its turns and the token that ends each, nothing of the
        headers, nothing after the end. It is found by rendering: a turn is what stands between the conversation before
        it with the generation prompt and the conversation up to it. Where the template rewrites earlier turns (dropped
        thoughts), these do not extend each other, and what the model would be trained to write is not what it was
        asked: InputError, with `keep_cots=True` or `last_turn_only=True` (mask the last assistant turn alone) as the
        remedies. Ids are those that sampling sees: the prompt and each turn are tokenized apart.
        """
        options.pop("add_generation_prompt", None)
        turns = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
        if not turns:
            raise InputError("the conversation has no assistant message; there is nothing to train on")
        whole = self.render(messages, **options)
        segments: list[tuple[str, int]] = []
        at = 0
        for turn in turns[-1:] if last_turn_only else turns:
            before = self.render(messages[:turn], add_generation_prompt=True, **options)
            upto = self.render(messages[: turn + 1], **options)
            if not (upto.startswith(before) and whole.startswith(upto) and len(before) >= at):
                raise InputError(
                    f"the chat template rewrites history: message {turn} is not written in the whole conversation as "
                    "it is when it is the last; pass keep_cots=True, last_turn_only=True, or one sample per turn"
                )
            end = self._end_of_turn(upto)
            segments += [(whole[at : len(before)], 0), (whole[len(before) : end], 1)]
            at = end
        segments.append((whole[at:], 0))
        return self._encode_segments(whole, segments)

    def _end_of_turn(self, text: str) -> int:
        """Where the turn's last token ends; templates write a newline after it."""
        stripped = text.rstrip()
        ends = tuple(filter(None, (*self.tokenizer.special_tokens, self.tokenizer.eos_token)))
        return len(stripped) if stripped.endswith(ends) else len(text)

    def _encode_segments(self, whole: str, segments: list[tuple[str, int]]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        mask: list[int] = []
        for text, flag in segments:
            part = self.tokenizer.encode(text, add_special_tokens=False)
            ids += part
            mask += [flag] * len(part)
        if self.tokenizer.decode(ids, skip_special_tokens=False) == whole:
            return ids, mask
        # A tokenizer that adds a space to the start of every text: pieces are not parts of the whole. Then a token
        # belongs to the segment that its last character is in.
        ids, offsets = self.tokenizer.encode_with_offsets(whole)
        flags = [flag for text, flag in segments for _ in text]
        return ids, [flags[end - 1] if end else 0 for _, end in offsets]


class _Generation(Extension):
    """`{% generation %}`, with which some templates mark the assistant's text: here it only has to be understood."""

    tags = {"generation"}  # noqa: RUF012  the base class declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@dataclass(frozen=True)
class _Compiled:
    compiled: jinja2.Template
    variables: frozenset[str]  # names that the template expects from outside


def _compile(source: str) -> _Compiled:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        variables = meta.find_undeclared_variables(environment.parse(source))
        return _Compiled(environment.from_string(source), frozenset(variables))
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"the chat template is not Jinja2: line {error.lineno}: {error.message}") from None


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON as it is (Jinja2's own filter escapes for HTML)."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _built_in(tokenizer: Tokenizer) -> str:
    if tokenizer.token_to_id("<|start_header_id|>") is not None:
        return LLAMA3_TEMPLATE
    if tokenizer.token_to_id("<|im_start|>") is not None:
        return CHATML_TEMPLATE
    raise ConfigError(
        "the checkpoint ships no chat template, and its vocabulary has the tokens of neither built-in one "
        '("<|im_start|>", "<|start_header_id|>"); pass a Jinja2 template as ChatTemplate(tokenizer, source)'
    )


def _plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    if isinstance(messages, str | Mapping):
        raise InputError(f"messages is a {type(messages).__name__}; pass a list of messages")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f'message {index} is {message!r:.80}; expected a mapping with a "role" and a "content"')
        if not isinstance(message.get("content"), str | list | tuple | None):
            kind = type(message["content"]).__name__
            raise InputError(f"message {index} has a content of type {kind}; expected text")
    return [_plain(message) for message in messages]


def _plain(value: Any) -> Any:
    """A copy made of JSON's types: a template, which is a stranger's program, gets no object with methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    for kind in (str, bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    raise InputError(f"a chat template takes JSON's types; got {type(value).__name__}")


def _with_thinking_prompt(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": THINKING_PROMPT}, *messages]
    first, *rest = messages
    if not isinstance(first.get("content"), str) or THINKING_PROMPT in first["content"]:
        return messages
    return [{**first, "content": f"{THINKING_PROMPT}\n\n{first['content']}"}, *rest]
