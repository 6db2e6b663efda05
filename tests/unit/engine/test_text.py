"""Text in and out: chat templates against transformers, streamed pieces against whole texts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from waybill.engine.chat_template import ChatTemplate, load_chat_template
from waybill.engine.detokenizer import Detokenizer, load_tokenizer
from waybill.engine.io_struct import FinishReason
from waybill.engine.token_decoder import TokenDecoder
from waybill.launch.args import EMBEDDED_MODEL

TOKENIZER = load_tokenizer(str(EMBEDDED_MODEL))
HF_TOKENIZER = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_the_template_renders_as_transformers_renders_it(add_generation_prompt: bool) -> None:
    template = load_chat_template(str(EMBEDDED_MODEL))
    assert template is not None and TOKENIZER is not None
    messages = [
        {"role": "user", "content": "start with 12"},
        {"role": "assistant", "content": "12"},
        {"role": "user", "content": "add 30 <é>"},
    ]
    text = template.render(messages, add_generation_prompt=add_generation_prompt)
    expected = HF_TOKENIZER.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    assert text == expected
    assert TOKENIZER.encode(text).ids == HF_TOKENIZER(expected)["input_ids"]


def test_a_template_may_refuse_and_cannot_reach_out() -> None:
    refusing = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(ValueError, match="messages: roles must alternate"):
        refusing.render([])
    with pytest.raises(ValueError, match="messages"):
        ChatTemplate("{{ ''.__class__.__mro__ }}", {}).render([])


def test_a_folder_without_template_or_tokenizer(tmp_path: Path) -> None:
    assert load_chat_template(str(tmp_path)) is None
    assert load_tokenizer(str(tmp_path)) is None


def make(stop: tuple[str, ...] = (), *, no_stop_trim: bool = False, skip: bool = True) -> Detokenizer:
    assert TOKENIZER is not None
    return Detokenizer(TokenDecoder(TOKENIZER), skip_special_tokens=skip, no_stop_trim=no_stop_trim, stop=stop)


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 263), max_size=12), cut=st.integers(1, 4), skip=st.booleans())
def test_streamed_pieces_joined_are_the_whole_text(ids: list[int], cut: int, skip: bool) -> None:
    """Any bytes: characters that are never completed, and special tokens between the bytes of one."""
    reason = FinishReason("length", length=len(ids))
    stream = make(skip=skip)
    pieces = [stream.push(ids[i : i + cut]) for i in range(0, len(ids) - cut, cut)]
    last = ids[len(pieces) * cut :]
    assert "".join(pieces) + stream.finish(last, reason) == make(skip=skip).finish(ids, reason)


def test_a_character_waits_for_all_of_its_bytes() -> None:
    stream = make()
    ids = list("é€".encode())
    assert [stream.push([token]) for token in ids] == ["", "é", "", "", "€"]


def test_nothing_of_a_stop_string_is_streamed() -> None:
    stop = FinishReason("stop", matched="STOP", text_length=3)
    stream = make(("STOP",))
    pieces = [stream.push([byte]) for byte in b"ab STO"]
    assert "".join(pieces) == "ab "
    assert stream.finish(b"P", stop) == ""
    assert make(("STOP",), no_stop_trim=True).finish(b"ab STOP", stop) == "ab STOP"


def test_a_matched_stop_token_is_cut_off() -> None:
    assert make(skip=False).finish([*b"12", 260], FinishReason("stop", matched=260)) == "12"
