"""Log-probabilities as text: a token's own bytes, where it stands in the text, and the same entries streamed and whole."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_tokenizers import KINDS

from waybill.engine.entrypoints.openai.logprobs import CompletionLogprobs, chat_logprobs
from waybill.engine.frontend.text_codec import TextCodec

CODECS = {name: TextCodec(tokenizer) for name, tokenizer in KINDS.items()}


def token(kind: str, name: str) -> int:
    found: int = KINDS[kind].token_to_id(name)
    return found


def answer(output: list[int], prompt: list[int], tops: int = 2) -> dict[str, Any]:
    """As the tokenizer manager renders one."""

    def top(ids: list[int]) -> list[list[tuple[float, int, str | None]]]:
        return [[(-0.5 - i, one + i, None) for i in range(tops)] for one in ids]

    meta: dict[str, Any] = {
        "output_token_logprobs": [(-1.0 - one, one, None) for one in output],
        "input_token_logprobs": [(None if i == 0 else -0.5, one, None) for i, one in enumerate(prompt)],
    }
    if tops:
        meta |= {"output_top_logprobs": top(output), "input_top_logprobs": [None, *top(prompt)[1:]] if prompt else []}
    return {"meta_info": meta, "output_ids": output}


def completions(kind: str, output: list[int], prompt: list[int] | None = None, *, skip: bool = True) -> dict[str, Any]:
    one = CompletionLogprobs(CODECS[kind], skip_special_tokens=skip, prompt_ids=prompt)
    return one.take(answer(output, prompt or []))


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "metaspace", "word_piece", "ctc"])
@settings(max_examples=40, deadline=None)
@given(data=st.data(), skip=st.booleans(), echo=st.booleans(), tops=st.integers(0, 2), cut=st.integers(1, 3))
def test_entries_streamed_are_those_of_the_whole(
    kind: str, data: st.DataObject, skip: bool, echo: bool, tops: int, cut: int
) -> None:
    ids = st.lists(st.integers(0, KINDS[kind].get_vocab_size() + 2), min_size=1, max_size=8)
    prompt, output = data.draw(ids), data.draw(ids)

    def make() -> CompletionLogprobs:
        return CompletionLogprobs(CODECS[kind], skip_special_tokens=skip, prompt_ids=prompt if echo else None)

    whole = make().take(answer(output, prompt if echo else [], tops))
    stream, parts = make(), []
    for start in range(0, len(output), cut):
        # Those of the prompt come with the first chunk.
        scored = prompt if echo and start == 0 else []
        parts.append(stream.take(answer(output[start : start + cut], scored, tops)))
    for name, entries in whole.items():
        assert [one for part in parts for one in part[name] or []] == (entries or []), name
    # A text of the prompt and one of the output, each as it is decoded.
    shown = KINDS[kind].decode(prompt, skip_special_tokens=False) if echo else ""
    text = shown + KINDS[kind].decode(output, skip_special_tokens=skip)
    offsets = whole["text_offset"]
    assert offsets == sorted(offsets) and offsets[0] == 0 and offsets[-1] <= len(text)
    assert not echo or offsets[len(prompt)] == len(shown)


def test_the_text_of_a_token_stands_where_its_offset_says() -> None:
    kind = "byte_level"
    ids = [*KINDS[kind].encode("STOP état", add_special_tokens=False).ids, token(kind, "<|user|>"), token(kind, "a")]
    for skip in (True, False):
        found = completions(kind, ids, skip=skip)
        text = KINDS[kind].decode(ids, skip_special_tokens=skip)
        for name, start in zip(found["tokens"], found["text_offset"], strict=True):
            assert text.startswith(name, start) or (skip and name == "<|user|>" and start == len(text) - 1)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_part_of_a_character_has_its_own_bytes_and_the_characters_offset(kind: str) -> None:
    by_bytes = {CODECS[kind].token_bytes(one): one for one in range(KINDS[kind].get_vocab_size())}
    parts = [by_bytes[bytes([byte])] for byte in "你".encode()]
    ids = [token(kind, "a"), *parts, token(kind, "b")]
    found = completions(kind, ids)
    assert found["tokens"] == ["a", "bytes:\\xe4", "bytes:\\xbd", "bytes:\\xa0", "b"]
    assert found["text_offset"] == [0, 1, 1, 1, 2]
    content = chat_logprobs(answer(ids[1:], []), CODECS[kind])["content"]
    assert [entry["bytes"] for entry in content] == [[0xE4], [0xBD], [0xA0], [ord("b")]]
    assert [entry["token"] for entry in content] == ["\\xe4", "\\xbd", "\\xa0", "b"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "你b"


def test_of_tokens_with_the_same_text_the_best_is_told() -> None:
    kind = "byte_fallback"
    same = [token(kind, "a"), token(kind, "<0x61>")]
    unknown = KINDS[kind].get_vocab_size()
    top = [(-3.0, same[0], None), (-1.0, same[1], None), (-2.0, unknown, None), (-4.0, unknown + 1, None)]
    meta = {"output_token_logprobs": [(-1.0, same[0], None)], "output_top_logprobs": [top]}
    for order in (top, top[::-1]):
        meta["output_top_logprobs"] = [order]
        one = CompletionLogprobs(CODECS[kind], skip_special_tokens=True, prompt_ids=None)
        assert one.take({"meta_info": meta})["top_logprobs"] == [{"a": -1.0, "": -2.0}]


def test_a_word_has_its_space_and_an_unknown_id_nothing() -> None:
    kind = "metaspace"
    unknown = KINDS[kind].get_vocab_size()
    ids = [token(kind, "▁a"), token(kind, "▁STOP"), unknown]
    found = completions(kind, ids)
    assert found["tokens"] == [" a", " STOP", ""]
    assert found["text_offset"] == [0, 1, len("a STOP")]
    content = chat_logprobs(answer(ids, []), CODECS[kind])["content"]
    assert content[1]["bytes"] == list(b" STOP") and content[2]["bytes"] is None and content[2]["token"] == ""


@pytest.mark.parametrize("kind", KINDS)
def test_ids_that_the_tokenizer_lacks_are_no_text(kind: str) -> None:
    codec, unknown = CODECS[kind], KINDS[kind].get_vocab_size() + 1
    ids = KINDS[kind].encode("STOP", add_special_tokens=False).ids
    assert codec.decode([unknown, *ids, unknown], skip_special_tokens=False) == KINDS[kind].decode(ids)
    assert codec.token_text(unknown) == "" and codec.token_bytes(unknown) is None


def test_without_a_tokenizer_there_is_no_text() -> None:
    one = CompletionLogprobs(TextCodec(None), skip_special_tokens=True, prompt_ids=None)
    found = one.take(answer([1, 2], []))
    assert found["tokens"] == ["", ""] and found["text_offset"] == [0, 0]
