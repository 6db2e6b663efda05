"""Text out: streamed pieces against whole texts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from waybill.engine.io_struct import FinishReason, OutputOptions
from waybill.engine.output.detokenizer import Detokenizer
from waybill.engine.text.token_decoder import TokenDecoder
from waybill.engine.text.tokenizer_file import load_tokenizer
from waybill.launch.args import EMBEDDED_MODEL

TOKENIZER = load_tokenizer(str(EMBEDDED_MODEL))


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    assert load_tokenizer(str(tmp_path)) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: no tokenizer can be made of it"):
        load_tokenizer(str(tmp_path))


def make(stop: tuple[str, ...] = (), *, no_stop_trim: bool = False, skip: bool = True) -> Detokenizer:
    assert TOKENIZER is not None
    options = OutputOptions(skip_special_tokens=skip, no_stop_trim=no_stop_trim)
    return Detokenizer(TokenDecoder(TOKENIZER), options, stop)


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
