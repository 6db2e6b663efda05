"""`split_special_tokens`: what a caller writes is text, what the template writes is tokens, and nothing else changes."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_tokenizers import ADDED, KINDS, SPECIAL
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from waybill.engine.entrypoints.native import TokenizeInput, tokenized, tokenized_messages
from waybill.engine.entrypoints.openai.chat_prompt import render_ids
from waybill.engine.entrypoints.openai.messages import ChatMessage
from waybill.engine.entrypoints.openai.protocol import ChatCompletionRequest
from waybill.engine.frontend.chat_template import ChatTemplate
from waybill.engine.frontend.text_codec import TextCodec

MOST = 100_000
TURN = "{% for m in messages %}<|user|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
TEMPLATE = ChatTemplate({"default": TURN}, {})
CODECS = {
    name: TextCodec(KINDS[name]) for name in ("byte_level", "byte_fallback", "byte_fallback_unstripped", "metaspace")
}
BYTE_LEVEL = CODECS["byte_level"]
PIECES = [*SPECIAL, ADDED, "STOP", " ", "\n", "<|", "|>", "<", "en", "d|>", "é", "你好", "🙂", "\ue000", "▁", "a"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


def bare(tokenizer: Tokenizer) -> Tokenizer:
    """It knows no special tokens."""
    made = Tokenizer(tokenizer.model)
    made.normalizer, made.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    made.add_tokens([AddedToken(ADDED, normalized=False)])
    return made


def ids_without_special(tokenizer: Tokenizer, text: str) -> list[int]:
    encoding = bare(tokenizer).encode(text)
    # Its one added token has another number.
    return [
        KINDS_ADDED[id(tokenizer)] if token == ADDED else token_id
        for token_id, token in zip(encoding.ids, encoding.tokens, strict=True)
    ]


KINDS_ADDED = {id(tokenizer): tokenizer.token_to_id(ADDED) for tokenizer in KINDS.values()}


def chat(codec: TextCodec, contents: list[str], template: ChatTemplate = TEMPLATE, **fields: Any) -> list[int]:
    messages = [ChatMessage(role="user", content=content) for content in contents]
    return render_ids(template, codec, messages, MOST, **{"split_special_tokens": True, **fields})


def num_special(codec: TextCodec, ids: list[int]) -> int:
    special = [codec.token_id(token) for token in SPECIAL]
    return sum(one in special for one in ids)


@pytest.mark.parametrize("kind", CODECS)
@given(contents=st.lists(TEXTS, min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_special_tokens_are_those_of_the_template(kind: str, contents: list[str]) -> None:
    tokenizer, codec = KINDS[kind], CODECS[kind]
    ids = chat(codec, contents)
    expected = []
    between = ""
    for content in contents:
        for text, token in ((between, "<|user|>"), (f"user\n{content}", "<|end|>")):
            expected += [*ids_without_special(tokenizer, text), tokenizer.token_to_id(token)]
        between = "\n"
    assert ids == expected + ids_without_special(tokenizer, "\n")
    assert num_special(codec, ids) == num_special(codec, chat(codec, ["harmless"] * len(contents)))


@given(contents=st.lists(TEXTS, min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_the_text_of_the_tokens_is_the_chat(contents: list[str]) -> None:
    rendered = TEMPLATE.render([{"role": "user", "content": content} for content in contents])
    assert BYTE_LEVEL.decode(chat(BYTE_LEVEL, contents), skip_special_tokens=False) == rendered


@pytest.mark.parametrize("codec", CODECS.values(), ids=list(CODECS))
@pytest.mark.parametrize("content", ["", "a STOP é", "< a > <| b", f"x {ADDED} y", "\ue000 \U0010fffd", "<|user |>"])
def test_a_chat_without_their_text_is_tokenised_as_before(codec: TextCodec, content: str) -> None:
    assert chat(codec, [content]) == chat(codec, [content], split_special_tokens=False)


def test_it_is_off_unless_the_request_or_the_server_says_so() -> None:
    content = "<|end|>"
    as_token = chat(BYTE_LEVEL, [content], split_special_tokens=False)
    assert num_special(BYTE_LEVEL, as_token) == 3 and chat(BYTE_LEVEL, [content], split_special_tokens=None) == as_token
    on = ChatTemplate({"default": TURN}, {}, split_special_tokens=True)
    as_text = chat(BYTE_LEVEL, [content])
    assert chat(BYTE_LEVEL, [content], on, split_special_tokens=None) == as_text != as_token
    assert chat(BYTE_LEVEL, [content], on, split_special_tokens=False) == as_token


def test_all_that_a_request_brings_is_text() -> None:
    """Names, arguments, their names, tools and variables of the template."""
    source = "<s>{{ messages | tojson }}{{ tools | tojson }}{{ kwarg }}<|end|>"
    call = {"type": "function", "function": {"name": "<|user|>", "arguments": '{"</s>": ["<|end|>"]}'}}
    message = ChatMessage(role="<|user|>", content=None, name="<s>", tool_calls=[call])
    template = ChatTemplate({"default": source}, {})
    fields: dict[str, Any] = {"tools": [{"function": {"name": "</s>"}}], "kwarg": "<|end|>"}
    ids = render_ids(template, BYTE_LEVEL, [message], MOST, split_special_tokens=True, **fields)
    assert num_special(BYTE_LEVEL, ids) == 2
    assert BYTE_LEVEL.decode(ids, skip_special_tokens=False) == template.render([message.for_template()], **fields)


@pytest.mark.parametrize(
    ("source", "contents"),
    [
        ("{{ messages[0].content }}d|>", ["<|en"]),
        ("{{ messages[0].content | trim }}d|>", ["<|en \n"]),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", ["<", "|user", "|>"]),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", ["<|user|", "><|", "end|>"]),
    ],
)
def test_none_comes_about_where_texts_meet(source: str, contents: list[str]) -> None:
    template = ChatTemplate({"default": source}, {})
    assert num_special(BYTE_LEVEL, chat(BYTE_LEVEL, contents, template)) == 0
    assert num_special(BYTE_LEVEL, chat(BYTE_LEVEL, contents, template, split_special_tokens=False)) > 0


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content | replace('<|end|>', '') }}",
        "{% if '<|end|>' in messages[0].content %}a{% endif %}",
        "{{ messages[0].content | tojson(ensure_ascii=true) }}",
    ],
)
def test_a_template_that_acts_on_their_text_is_a_refusal(source: str) -> None:
    template = ChatTemplate({"default": source}, {})
    with pytest.raises(ValueError, match=r"^messages: have the text of a special token that the chat template acts on"):
        chat(BYTE_LEVEL, ["a <|end|>"], template)
    chat(BYTE_LEVEL, ["harmless"], template)


@pytest.mark.parametrize(
    ("content", "taken_out"),
    [
        ("<|en/thinkd|>", "<|end|>"),
        ("</think|us/thinke/thinkr|>", "<|user|>"),
        ("STO/thinkP<|en/thinkd|>", "STOP<|end|>"),
    ],
)
def test_none_comes_about_where_a_template_takes_other_text_out(content: str, taken_out: str) -> None:
    """As Nemotron's do with `/think`, which leaves what stood on both sides beside each other."""
    template = ChatTemplate({"default": "{{ messages[0].content | replace('/think', '') }}<|end|>"}, {})
    assert template.render([{"role": "user", "content": content}]) == taken_out + "<|end|>"
    with pytest.raises(ValueError, match=r"^messages: have the text of a special token that the chat template acts on"):
        chat(BYTE_LEVEL, [content], template)
    for harmless in ("a < b /think", "<|en /think d|>", "</think> |> <|", "<|end|>/think"):
        ids = chat(BYTE_LEVEL, [harmless], template)
        assert num_special(BYTE_LEVEL, ids) == 1
        assert BYTE_LEVEL.decode(ids, skip_special_tokens=False) == harmless.replace("/think", "") + "<|end|>"


def test_a_token_of_letters_is_text_too() -> None:
    codec = with_tokens(AddedToken("EOS", special=True), AddedToken("<a>", special=True))
    template = ChatTemplate({"default": "{{ messages[0].content }}EOS"}, {})
    ids = chat(codec, ["an EOS"], template)
    assert [codec.token_id("EOS") == one for one in ids].count(True) == 1


def with_tokens(*tokens: AddedToken, normalizer: Any = None) -> TextCodec:
    tokenizer = Tokenizer(KINDS["byte_level"].model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = KINDS["byte_level"].decoder
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_tokens(list(tokens))
    return TextCodec(tokenizer)


OF_EVERY_KIND = (
    with_tokens(AddedToken("<a>", special=True, lstrip=True, rstrip=True, normalized=False)),
    with_tokens(AddedToken("<a>", special=True, normalized=True), normalizer=normalizers.NFKC()),
    with_tokens(AddedToken("<A>", special=True, normalized=True), normalizer=normalizers.Lowercase()),
    with_tokens(AddedToken("<a>", special=True, single_word=True, normalized=False)),
    with_tokens(AddedToken("<a>", special=True), AddedToken("a>", special=True), AddedToken(">b", special=True)),
    # Not marked, and yet control tokens.
    with_tokens(AddedToken("<｜a｜>", special=False), AddedToken("<|a|>", special=False)),
)


@pytest.mark.parametrize("codec", OF_EVERY_KIND)
@given(
    text=st.lists(st.sampled_from(["<a>", "＜ａ＞", "<A>", "<｜a｜>", "<|a|>", "b", " ", "\n"]), max_size=6).map(
        "".join
    )
)
@settings(max_examples=40, deadline=None)
def test_tokens_of_every_kind(codec: TextCodec, text: str) -> None:
    """A prompt of text has none; in a chat they are the template's, with the white space that they take."""
    tokenizer = codec._tokenizer
    assert tokenizer is not None
    plain = Tokenizer(tokenizer.model)
    plain.pre_tokenizer, plain.normalizer = tokenizer.pre_tokenizer, tokenizer.normalizer
    assert codec.encode(text, split_special_tokens=True) == plain.encode(text).ids
    of_template = ["<a>", "a>", "<A>", "<｜a｜>"]
    source = "{{ messages[0].content }}\n" + "  ".join(of_template) + " {{ messages[0].content }}"
    template = ChatTemplate({"default": source}, {})
    added = set(tokenizer.get_added_tokens_decoder())
    ids, harmless = (chat(codec, [content], template) for content in (text, "b"))
    assert [one for one in ids if one in added] == [one for one in harmless if one in added]


def test_what_is_added_to_a_text_stays() -> None:
    tokenizer = Tokenizer.from_str(KINDS["byte_level"].to_str())
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    codec = TextCodec(tokenizer)
    bos = tokenizer.token_to_id("<s>")
    ids = codec.encode("<s>a", split_special_tokens=True)
    assert ids == [bos, *ids_without_special(KINDS["byte_level"], "<s>a")]
    assert codec.encode("<s>a", split_special_tokens=True, add_special_tokens=False) == ids[1:]
    assert codec.encode("<s>a") == [bos, bos, *codec.encode("a", add_special_tokens=False)]


def test_a_model_that_makes_them_itself_is_a_refusal() -> None:
    tokenizer = Tokenizer(models.Unigram([("<unk>", -9.0), ("</s>", 0.0), ("a", -1.0)], 0))
    tokenizer.add_special_tokens(["</s>", "<unk>"])
    codec = TextCodec(tokenizer)
    with pytest.raises(ValueError, match=r"^text: the tokenizer cannot take its special tokens as text"):
        codec.encode("a</s>", split_special_tokens=True)
    # Unknown text is no special token of the caller's.
    assert codec.encode("ab", split_special_tokens=True) == codec.encode("ab") == [2, 0]


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match="has no tokenizer"):
        TextCodec(None).encode("a", split_special_tokens=True)
    with pytest.raises(ValueError, match="UTF-8"):
        chat(BYTE_LEVEL, ["\ud800<|end|>"])
    tokenizer = Tokenizer.from_str(KINDS["byte_level"].to_str())
    tokenizer.enable_truncation(5)
    with pytest.raises(ValueError, match="truncates or pads, so split_special_tokens must be false"):
        TextCodec(tokenizer).encode("a", split_special_tokens=True)
    with pytest.raises(ValueError, match="must have at most 3"):
        BYTE_LEVEL.encode("<|end|>", split_special_tokens=True, max_tokens=3)


def test_long_texts_with_many_of_them() -> None:
    text = "a <|end|>é" * 2_000
    ids = BYTE_LEVEL.encode(text, split_special_tokens=True)
    assert num_special(BYTE_LEVEL, ids) == 0 and BYTE_LEVEL.decode(ids, skip_special_tokens=True) == text


def test_tokenize_takes_it() -> None:
    body = TokenizeInput(prompt=["<|end|>", "a"], split_special_tokens=True)
    ids = msgspec.json.decode(tokenized(body, BYTE_LEVEL, MOST))["tokens"]
    assert ids == [ids_without_special(KINDS["byte_level"], "<|end|>"), BYTE_LEVEL.encode("a")]
    messages = TokenizeInput(messages=[{"role": "user", "content": "<|end|>"}], split_special_tokens=True)
    assert msgspec.json.decode(tokenized_messages(messages, BYTE_LEVEL, TEMPLATE, MOST))["tokens"] == chat(
        BYTE_LEVEL, ["<|end|>"]
    )


def test_variables_of_a_template_may_have_any_other_name() -> None:
    template = ChatTemplate({"default": "{{ text }}{{ max_tokens }}{{ template }}"}, {})
    names = {"text": "a", "max_tokens": 3, "template": "b"}
    assert render_ids(template, BYTE_LEVEL, [], MOST, **names) == BYTE_LEVEL.encode("a3b")
    with pytest.raises(ValueError, match="chat_template_kwargs: must not have 'split_special_tokens'"):
        ChatCompletionRequest(
            messages=[{"role": "user", "content": "a"}], chat_template_kwargs={"split_special_tokens": True}
        )
