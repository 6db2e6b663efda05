"""Chat templates, against `apply_chat_template` of transformers: how they are found, what they see, what they may do."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from support.small_tokenizers import KINDS
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from waybill.engine.frontend.chat_template import ChatTemplate, load_chat_template
from waybill.engine.text.tokenizer_file import load_tokenizer
from waybill.launch.args import EMBEDDED_MODEL

TOKENIZER = load_tokenizer(str(EMBEDDED_MODEL))
HF_TOKENIZER = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
MESSAGES = [
    {"role": "system", "content": "be <b>brief</b>"},
    {"role": "user", "content": "start with 12"},
    {"role": "assistant", "content": "12", "tool_calls": None, "reasoning": "easy"},
    {"role": "user", "content": "add 30 'é' 🙂"},
]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
LOOP = "{%- for m in messages %}{{ '<|' + m.role + '|>' + m['content'] }}\n{% endfor -%}"
TEMPLATES = {
    "loop": LOOP,
    "generation prompt": LOOP + "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "generation blocks": "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "special tokens": "{{ bos_token }}"
    + LOOP
    + "{{ eos_token }}{{ pad_token }}{{ unk_token is defined }}{{ image_token }}",
    "tools is not none": "{% if tools is not none %}TOOLS {{ tools | tojson }}{% else %}plain{% endif %}",
    "tools is defined": "{{ tools is defined }}{{ documents is defined }}{{ documents is none }}{{ custom is defined }}",
    "tojson": "{{ messages | tojson(indent=2) }}{{ messages[0] | tojson(sort_keys=True, separators=(',', ':')) }}",
    "strftime": "{{ strftime_now('%Y') }}",
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "macro": "{% macro show(m) %}[{{ m.role | upper }}]{{ m.content | trim }}{% endmacro %}{{ show(messages[-1]) }}",
    "null keys": "{% for m in messages %}{{ m.tool_calls is defined }}{{ 'tool_calls' in m }}{% endfor %}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content or '-' }}{% endfor %}",
    "variables": "{{ enable_thinking | default(true) }}{{ words | default([]) | join(',') }}",
    "dictionary": "{% set d = dict(a=1) %}{{ d.a }}{{ dict.fromkeys(['x']) }}{{ range(3) | list }}",
    "trim blocks": "  {% if true %}\n  a\n  {% endif %}\n{#- note -#}\nb",
}
PLAIN = {"bos_token": "<s>", "eos_token": "</s>"}
ADDED = {
    "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False, "special": True},
    "eos_token": "</s>",
    "pad_token": None,
    "image_token": "<|user|>",
    "add_bos_token": True,
}
EXTRA = {**PLAIN, "extra_special_tokens": {"image_token": "<|end|>"}}
DECODED = {
    **PLAIN,
    "added_tokens_decoder": {"267": {"content": "<s>", "special": True}, "268": {"content": "</s>", "special": True}},
}


def make_folder(folder: Path, config: dict[str, Any] | str, files: dict[str, str] | None = None) -> Path:
    """A checkpoint folder as far as text goes."""
    KINDS["byte_level"].save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    for name, text in (files or {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def render_both(folder: Path, **options: Any) -> tuple[str, str]:
    template = load_chat_template(str(folder))
    assert template is not None
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, **options)
    return template.render(MESSAGES, **options), expected


@pytest.mark.parametrize("config", [PLAIN, ADDED, EXTRA], ids=["plain", "added", "extra"])
def test_templates_render_as_transformers_renders_them(tmp_path: Path, config: dict[str, Any]) -> None:
    theirs = PreTrainedTokenizerFast.from_pretrained(make_folder(tmp_path, config))
    for name, source in TEMPLATES.items():
        template = load_chat_template(str(make_folder(tmp_path, {**config, "chat_template": source})))
        assert template is not None
        for options in (
            {"add_generation_prompt": True},
            {"add_generation_prompt": False, "tools": [TOOL], "documents": [{"title": "t", "text": "x"}]},
            {"add_generation_prompt": True, "enable_thinking": False, "words": ["a", "b"], "custom": 1},
        ):
            expected = theirs.apply_chat_template(MESSAGES, tokenize=False, chat_template=source, **options)
            assert template.render(MESSAGES, **options) == expected, name


@pytest.mark.parametrize("config", [PLAIN, DECODED], ids=["merged", "ignored"])
def test_special_tokens_of_an_older_checkpoint(tmp_path: Path, config: dict[str, Any]) -> None:
    """Their own file counts where the configuration does not list the added tokens."""
    special = {"bos_token": {"content": "<|user|>", "lstrip": False}, "pad_token": "<|end|>"}
    config = {**config, "chat_template": TEMPLATES["special tokens"]}
    folder = make_folder(tmp_path, config, {"special_tokens_map.json": json.dumps(special)})
    ours, theirs = render_both(folder, add_generation_prompt=True)
    assert ours == theirs
    assert ours.startswith("<|user|>" if "added_tokens_decoder" not in config else "<s>")


LIST = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }} tools"}]


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({"chat_template": LIST}, {}),
        (
            {"chat_template": "never"},
            {"chat_template.jinja": "a file", "additional_chat_templates/tool_use.jinja": "with tools"},
        ),
        ({"chat_template": "never"}, {"chat_template.jinja": "a file"}),
        (
            {},
            {
                "chat_template.jinja": "one",
                "additional_chat_templates/default.jinja": "other",
                "additional_chat_templates/rag.jinja": "r",
            },
        ),
    ],
    ids=["list", "files", "file", "default in folder"],
)
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["plain", "tools"])
def test_named_templates(tmp_path: Path, config: dict[str, Any], files: dict[str, str], tools: Any) -> None:
    ours, theirs = render_both(make_folder(tmp_path, config, files), tools=tools, add_generation_prompt=True)
    assert ours == theirs != "never"


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_the_embedded_template(add_generation_prompt: bool) -> None:
    template = load_chat_template(str(EMBEDDED_MODEL))
    assert template is not None and TOKENIZER is not None
    messages = MESSAGES[1:]
    text = template.render(messages, add_generation_prompt=add_generation_prompt)
    expected = HF_TOKENIZER.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    assert text == expected
    assert TOKENIZER.encode(text).ids == HF_TOKENIZER(expected)["input_ids"]


def test_a_folder_without_template(tmp_path: Path) -> None:
    assert load_chat_template(str(tmp_path)) is None
    assert load_chat_template(str(make_folder(tmp_path, PLAIN))) is None


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"chat_template": "{% for m in messages %}"}, "cannot be compiled: Unexpected end of template"),
        ({"chat_template": "{% nonsense %}"}, "cannot be compiled: Encountered unknown tag"),
        ({"chat_template": "{{ 1 | no_such_filter }}"}, "cannot be compiled: No filter named"),
        ({"chat_template": [{"name": "rag", "template": "x"}]}, "no 'default' one"),
        ({"chat_template": [{"name": "default"}]}, "cannot be read"),
        ({"chat_template": 5}, "chat_template: must be text"),
        ("{", "tokenizer_config.json: Expecting"),
        ("[]", "tokenizer_config.json: must be a JSON object"),
        (b"\xff", "cannot be read"),
    ],
)
def test_what_cannot_be_compiled_or_read_disables_chat_alone(
    tmp_path: Path, config: Any, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_folder(tmp_path, "" if isinstance(config, bytes) else config)
    if isinstance(config, bytes):
        (folder / "tokenizer_config.json").write_bytes(config)
    with caplog.at_level(logging.WARNING):
        template = load_chat_template(str(folder))
    assert template is not None
    with pytest.raises(ValueError, match=r"^messages: .*; give input_ids$") as refusal:
        template.render(MESSAGES)
    assert words in str(refusal.value)
    assert "no 'default' one" in words or "chat takes input_ids only" in caplog.text


def test_one_of_several_that_cannot_be_compiled_leaves_the_others() -> None:
    template = ChatTemplate({"default": "fine", "tool_use": "{% nonsense %}"}, {})
    assert template.render(MESSAGES) == "fine"
    with pytest.raises(ValueError, match="'tool_use' cannot be compiled"):
        template.render(MESSAGES, tools=[TOOL])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "^messages: roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "^messages: "),
        ("{{ messages.append(1) }}", "^messages: "),
        ("{{ missing.attribute }}", "^messages: "),
        ("{{ 1 / 0 }}", "cannot be compiled|ZeroDivisionError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ words.x.y }}", "^messages"),
        ("{{ '%d' | format('x') }}", "cannot be compiled|TypeError"),
        ("{{ strftime_now('\ud800') }}", "messages"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'x' * (10 ** 15) }}", "MemoryError|OverflowError|cannot be compiled"),
        ("{{ messages | map(attribute='role') | list | sum }}", "TypeError"),
        ("{{ dict(messages) }}", "messages"),
    ],
)
def test_whatever_a_template_raises_is_the_requests_fault(source: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ChatTemplate({"default": source}, {}).render(MESSAGES)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10 ** 9) %}{{ i }}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ messages[0].content }}{% endfor %}{% endfor %}",
        "{% macro f() %}{% for i in range(99999) %}{{ messages }}{% endfor %}{% endmacro %}{{ f() }}",
        "{{ messages[0].content * n }}",
    ],
)
def test_what_a_template_makes_is_bounded(source: str) -> None:
    with pytest.raises(ValueError, match=r"makes more than 1000 characters|Range too big|too big"):
        ChatTemplate({"default": source}, {}, max_chars=1000).render(MESSAGES, n=1000)


@pytest.mark.parametrize(
    "name",
    ["eos_token", "chat_template", "continue_final_message", "return_assistant_tokens_mask", "conversations", "self"],
)
def test_variables_cannot_take_the_place_of_arguments(name: str) -> None:
    template = ChatTemplate({"default": "{{ messages | length }}"}, {"eos_token": "</s>"})
    with pytest.raises(ValueError, match="chat_template_kwargs"):
        template.render(MESSAGES, **{name: "x"})
