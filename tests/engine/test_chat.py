"""Messages to text and ids: shipped templates, the built-in ones, loss masks."""

import json

import pytest
from tokenizers import Tokenizer as Backend

from engine.chat import CHATML_TEMPLATE, LLAMA3_TEMPLATE, THINKING_PROMPT, ChatTemplate
from engine.errors import ConfigError, InputError
from engine.tokenizer import Tokenizer
from tests.engine.test_tokenizer import byte_fallback_backend
from tests.tiny import save_tiny_tokenizer

USER = {"role": "user", "content": "1 + 1?"}
THINKER = {"role": "assistant", "content": "<think>\none and one\n</think>\n2"}
AGAIN = {"role": "user", "content": "2 + 2?"}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALLER = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": "it's"}}}],
}
RESULT = {"role": "tool", "content": "2"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    save_tiny_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory):
    return Tokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def chatml(tokenizer):
    return ChatTemplate(tokenizer)


def trained_text(template, messages, **options):
    """The text of the tokens under the mask, turn by turn."""
    ids, mask = template.render_with_mask(messages, **options)
    assert len(ids) == len(mask) and mask[0] == 0
    turns, run = [], []
    for token, flag in [*zip(ids, mask, strict=True), (0, 0)]:
        if flag:
            run.append(token)
        elif run:
            turns.append(template.tokenizer.decode(run, skip_special_tokens=False))
            run = []
    return turns


# ---- the built-in templates ----


def test_chatml_is_chosen_by_its_tokens_and_written_as_expected(chatml):
    text = chatml.render([{"role": "system", "content": "Be brief."}, USER], add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_llama3_is_chosen_by_its_tokens_and_begins_with_bos(directory):
    backend = Backend.from_file(str(directory / "tokenizer.json"))
    backend.add_special_tokens(["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
    config = json.dumps({"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}).encode()
    tokenizer = Tokenizer({"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": config})
    template = ChatTemplate(tokenizer)
    assert template.render([USER], add_generation_prompt=True) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n1 + 1?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert template.encode([USER]).count(tokenizer.bos_token_id) == 1
    assert trained_text(template, [USER, {"role": "assistant", "content": "2"}]) == ["2<|eot_id|>"]


def test_thinking_switch_is_the_system_prompt(chatml):
    assert chatml.render([USER], thinking=True) == chatml.render([{"role": "system", "content": THINKING_PROMPT}, USER])
    system = {"role": "system", "content": "Be brief."}
    assert f"{THINKING_PROMPT}\n\nBe brief." in chatml.render([system, USER], thinking=True)
    assert THINKING_PROMPT not in chatml.render([system, USER])


def test_thinking_prompt_is_not_said_twice(chatml):
    system = {"role": "system", "content": f"Be brief. {THINKING_PROMPT}"}
    assert chatml.render([system, USER], thinking=True) == chatml.render([system, USER])


def test_earlier_thoughts_are_dropped_unless_kept(chatml):
    history = [USER, THINKER, AGAIN]
    assert "one and one" not in chatml.render(history) and "assistant\n2<|im_end|>" in chatml.render(history)
    assert "one and one" in chatml.render(history, keep_cots=True)
    assert "one and one" in chatml.render([USER, THINKER])


def test_thought_between_tool_calls_of_one_turn_is_kept(chatml):
    caller = {**CALLER, "content": "<think>\nI shall add\n</think>"}
    assert "I shall add" in chatml.render([USER, caller, RESULT], add_generation_prompt=True)
    assert "I shall add" not in chatml.render([USER, caller, RESULT, THINKER, AGAIN])


def test_reasoning_content_becomes_the_thought(chatml):
    message = {"role": "assistant", "content": "2", "reasoning_content": "one and one"}
    assert chatml.render([USER, message]) == chatml.render([USER, THINKER])


def test_tools_are_listed_called_and_answered(chatml):
    text = chatml.render([USER, CALLER, RESULT], tools=[ADD])
    assert f"<tools>\n{json.dumps(ADD)}\n</tools><|im_end|>" in text
    call = '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"a": "it\'s"}}\n</tool_call><|im_end|>'
    assert call in text
    assert "<|im_start|>tool\n<tool_response>\n2\n</tool_response><|im_end|>" in text


def test_rendered_call_parses_back(chatml):
    from engine.response import ToolCall, parse_response

    text = chatml.render([USER, CALLER]).split("assistant\n")[1].removesuffix("<|im_end|>\n")
    assert parse_response(text).tool_calls == [ToolCall("add", {"a": "it's"})]


def test_unknown_role_is_refused(chatml):
    with pytest.raises(InputError, match='unknown role "wizard"'):
        chatml.render([{"role": "wizard", "content": "hm"}])


def test_vocabulary_without_either_format_is_refused():
    tokenizer = Tokenizer({"tokenizer.json": byte_fallback_backend().to_str().encode()})
    with pytest.raises(ConfigError, match="ships no chat template"):
        ChatTemplate(tokenizer)


# ---- shipped templates ----


def shipped(source, **more):
    return "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}" + source


SHIPPED = [
    CHATML_TEMPLATE,
    LLAMA3_TEMPLATE,
    """{%- for message in messages %}
    {%- if message['role'] not in ['user', 'assistant'] %}
        {{- raise_exception('only users and assistants') }}
    {%- endif %}
    {%- if loop.index0 > 5 %}{% break %}{% endif %}
    {{- '[' + message['role'] + ']' + message['content'] | trim + eos_token }}
{%- endfor %}
{%- if tools is defined and tools %}{{ tools | tojson(indent=2) }}{% endif %}
{%- if add_generation_prompt %}
    {{- '[assistant]' }}
{%- endif %}
""",
    """{% for message in messages %}
    {% if message.role == 'assistant' %}
[A]{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
    {% else %}
[U]{{ message.content }}
    {% endif %}
{% endfor %}""",
]


@pytest.mark.parametrize("source", SHIPPED)
def test_shipped_template_renders_as_in_transformers(tmp_path, source):
    transformers = pytest.importorskip("transformers")
    save_tiny_tokenizer(tmp_path, chat_template=source)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [USER, {"role": "assistant", "content": "2 <é> & \"'"}, AGAIN]
    for options in ({"add_generation_prompt": True}, {"tools": [ADD]}):
        switches = {"thinking": False, "keep_cots": False, "tools_prompt": "T", "bos_token": "", **options}
        expected = theirs.apply_chat_template(messages, tokenize=False, **{"tools": None, **switches})
        ours = ChatTemplate.from_pretrained(tmp_path).render(messages, **options)
        if "tools" in options:
            from engine.chat import TOOLS_PROMPT

            ours = ours.replace(TOOLS_PROMPT, "T")
        assert ours == expected


def test_named_template_for_tools_is_used_with_tools(tmp_path):
    save_tiny_tokenizer(tmp_path)
    (tmp_path / "chat_template.json").write_text(
        json.dumps({"chat_template": {"default": "plain", "tool_use": "tools"}})
    )
    template = ChatTemplate.from_pretrained(tmp_path)
    assert template.render([USER]) == "plain" and template.render([USER], tools=[ADD]) == "tools"


def test_template_with_a_switch_gets_it_and_one_without_gets_the_system_prompt(tokenizer):
    own = ChatTemplate(tokenizer, "{% if thinking %}THINK{% endif %}{{ messages | length }}")
    assert own.render([USER], thinking=True) == "THINK1"
    qwen = ChatTemplate(tokenizer, "{% if enable_thinking is defined and enable_thinking is false %}NOT{% endif %}")
    assert qwen.render([USER], thinking=True) == "" and qwen.render([USER]) == "NOT"
    assert qwen.render([USER], enable_thinking=True) == ""
    none = ChatTemplate(tokenizer, "{{ messages[0].content }}")
    assert none.render([USER], thinking=True) == THINKING_PROMPT and none.render([USER]) == "1 + 1?"


def test_further_arguments_reach_the_template(tokenizer):
    assert ChatTemplate(tokenizer, "{{ mood }}").render([USER], mood="merry") == "merry"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].content + 1 }}",
        "{{ raise_exception('no') }}",
    ],
)
def test_what_a_template_may_not_do_or_refuses_is_an_input_error(tokenizer, source):
    with pytest.raises(InputError, match="the chat template refuses"):
        ChatTemplate(tokenizer, source).render([USER])


def test_template_that_is_no_jinja_is_a_config_error(tokenizer):
    with pytest.raises(ConfigError, match="line 1"):
        ChatTemplate(tokenizer, "{% if %}")


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ("text", "messages is a str; pass a list"),
        ({"role": "user"}, "messages is a dict; pass a list"),
        (["text"], "message 0 is 'text'; expected a mapping"),
        ([{"content": "x"}], r"message 0 is \{'content': 'x'\}; expected a mapping"),
        ([{"role": "user", "content": 3}], "message 0 has a content of type int"),
    ],
)
def test_what_are_no_messages_is_refused(chatml, messages, complaint):
    with pytest.raises(InputError, match=complaint):
        chatml.render(messages)


def test_object_with_methods_does_not_reach_the_template(chatml):
    with pytest.raises(InputError, match="JSON's types; got object"):
        chatml.render([{**USER, "extra": object()}])


# ---- masks ----


def test_mask_covers_content_and_end_of_turn_only(chatml):
    messages = [{"role": "system", "content": "Be brief."}, USER, THINKER]
    assert trained_text(chatml, messages) == ["<think>\none and one\n</think>\n2<|im_end|>"]


def test_mask_covers_every_turn_of_the_assistant(chatml):
    two = {"role": "assistant", "content": "2"}
    four = {"role": "assistant", "content": "4"}
    assert trained_text(chatml, [USER, two, AGAIN, four]) == ["2<|im_end|>", "4<|im_end|>"]


def test_mask_covers_calls_but_not_their_results(chatml):
    call, answer = trained_text(chatml, [USER, CALLER, RESULT, THINKER], tools=[ADD])
    assert call.startswith("<tool_call>") and call.endswith("</tool_call><|im_end|>")
    assert answer.endswith("2<|im_end|>")


def test_masked_ids_are_the_whole_conversation(chatml):
    messages = [USER, {"role": "assistant", "content": "2 🐍"}, AGAIN]
    ids, _ = chatml.render_with_mask(messages)
    assert ids == chatml.encode(messages)


def test_prompt_of_a_masked_sample_is_what_sampling_sees(chatml):
    """An answer that begins with a newline must not melt into the newline that ends the header."""
    messages = [USER, {"role": "assistant", "content": "\nthe answer"}]
    ids, mask = chatml.render_with_mask(messages)
    prompt = chatml.encode([USER], add_generation_prompt=True)
    assert ids[: len(prompt)] == prompt and mask[: len(prompt)] == [0] * len(prompt) and mask[len(prompt)] == 1


def test_rewritten_history_is_refused_with_the_remedies(chatml):
    history = [USER, THINKER, AGAIN, THINKER]
    with pytest.raises(InputError, match=r"rewrites history: message 1 .*keep_cots=True"):
        chatml.render_with_mask(history)
    assert len(trained_text(chatml, history, keep_cots=True)) == 2
    assert trained_text(chatml, history, last_turn_only=True) == ["<think>\none and one\n</think>\n2<|im_end|>"]


def test_template_whose_generation_prompt_is_not_how_it_writes_a_turn_is_refused(tokenizer):
    source = shipped("{% if add_generation_prompt %}ASSISTANT> {% endif %}")
    with pytest.raises(InputError, match="rewrites history"):
        ChatTemplate(tokenizer, source).render_with_mask([USER, THINKER])


def test_turn_without_end_token_is_covered_to_its_end(tokenizer):
    template = ChatTemplate(tokenizer, shipped("{% if add_generation_prompt %}assistant: {% endif %}"))
    assert trained_text(template, [USER, {"role": "assistant", "content": "2"}, AGAIN]) == ["2\n"]


def test_mask_holds_for_a_tokenizer_that_adds_a_space_to_every_text():
    config = json.dumps({"eos_token": "</s>", "bos_token": "<s>"}).encode()
    tokenizer = Tokenizer(
        {"tokenizer.json": byte_fallback_backend().to_str().encode(), "tokenizer_config.json": config}
    )
    source = (
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[{{ message.content }}]"
        "{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    template = ChatTemplate(tokenizer, source)
    messages = [{"role": "user", "content": "a hat"}, {"role": "assistant", "content": "the hat"}]
    ids, mask = template.render_with_mask(messages)
    assert ids == template.encode(messages)
    trained = [token for token, flag in zip(ids, mask, strict=True) if flag]
    assert tokenizer.id_to_token(trained[0]) == "▁the"
    assert tokenizer.decode(trained, skip_special_tokens=False) == "the hat</s>"


def test_conversation_without_assistant_is_refused(chatml):
    with pytest.raises(InputError, match="nothing to train on"):
        chatml.render_with_mask([USER])
