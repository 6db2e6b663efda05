"""Texts that grow, against the library's `decode` of all tokens: every kind of tokenizer, any ids."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_tokenizers import KINDS, SPECIAL
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel

from waybill.engine.text.byte_stages import MAX_OPEN_BYTES, Bytes, make_to_bytes
from waybill.engine.text.decoder_stages import DecoderError, library_decode, make_stages
from waybill.engine.text.token_decoder import TextStream, TokenDecoder, join_all

DECODERS = {name: TokenDecoder(tokenizer) for name, tokenizer in KINDS.items()}
# Ids beyond every vocabulary here, as models have that pad theirs.
NUM_IDS = max(tokenizer.get_vocab_size() for tokenizer in KINDS.values()) + 3


def some_ids(kind: str) -> st.SearchStrategy[list[int]]:
    """Any ids, and runs of those that make trouble: bytes, special tokens, ids without a token."""
    tokenizer = KINDS[kind]
    size = tokenizer.get_vocab_size()
    named = [tokenizer.token_to_id(token) for token in SPECIAL]
    any_id = st.integers(0, size + 3)
    texts = st.sampled_from(["STOP 你🙂 a", "é", "🙂🙂", " a  b ", "don't ."])
    parts = st.one_of(
        st.lists(any_id, max_size=6),
        st.lists(st.sampled_from([*named, size + 2]), max_size=4),
        texts.map(lambda text: tokenizer.encode(text, add_special_tokens=False).ids),
    )
    return st.lists(parts, max_size=4).map(lambda lists: [token for ids in lists for token in ids])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), cut=st.integers(1, 3), skip=st.booleans())
def test_pieces_joined_are_the_decoded_whole(kind: str, data: st.DataObject, cut: int, skip: bool) -> None:
    ids = data.draw(some_ids(kind))
    stream = TextStream(DECODERS[kind], skip_special_tokens=skip)
    pieces = [stream.push(ids[i : i + cut]) for i in range(0, len(ids), cut)]
    assert "".join(pieces) + stream.close() == KINDS[kind].decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"replaced_by_pattern"}))
@settings(max_examples=60, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_the_text_so_far_is_that_of_its_tokens_but_for_an_incomplete_character(
    kind: str, data: st.DataObject, skip: bool
) -> None:
    ids = data.draw(some_ids(kind))
    stream = TextStream(DECODERS[kind], skip_special_tokens=skip)
    settled = ""
    for num, token in enumerate(ids, 1):
        settled += stream.push([token])
        so_far = settled + stream.tail()
        expected = KINDS[kind].decode(ids[:num], skip_special_tokens=skip)
        if "\ufffd" not in expected:
            assert so_far == expected
        else:
            assert expected.startswith(so_far) or set(expected[len(settled) :]) == {"\ufffd"}


# By byte, the character in which byte-level tokenizers write it.
ALPHABET = {make_to_bytes()(character)[0]: character for character in ByteLevel.alphabet()}
ELEMENTS = st.one_of(
    st.sampled_from(
        ["▁", "▁a", "##b", "a</w>", "<0xE4>", "<0xBD>", "<0xA0>", "<0x41>", " ", "", "<pad>", "|", " .", "ä½"]
    ),
    st.text(" a▁|#é", max_size=3),
)
PARTS: list[Callable[[], decoders.Decoder]] = [
    decoders.ByteLevel,
    decoders.ByteFallback,
    decoders.Fuse,
    decoders.Metaspace,
    decoders.WordPiece,
    decoders.BPEDecoder,
    decoders.CTC,
    lambda: decoders.Replace("▁", " "),
    lambda: decoders.Replace(" a", "b"),
    lambda: decoders.Strip(" ", 1, 0),
    lambda: decoders.Strip("a", 2, 0),
]


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(st.sampled_from(PARTS), min_size=1, max_size=4), elements=st.lists(ELEMENTS, min_size=1, max_size=8)
)
def test_any_chain_of_the_librarys_decoders(parts: list[Callable[[], decoders.Decoder]], elements: list[str]) -> None:
    chain = decoders.Sequence([part() for part in parts])
    stages = [make() for make in make_stages(json.loads(chain.__getstate__()))]
    text = ""
    for element in elements:
        pieces = [element]
        for stage in stages:
            pieces = stage.push(pieces)
        text += "".join(pieces)
    assert text + join_all(stages, []) == chain.decode(elements)


@settings(max_examples=150, deadline=None)
@given(
    data=st.lists(
        st.sampled_from(sorted({*range(0x7E, 0x92), 0xA0, *range(0xBD, 0xC4), *range(0xDF, 0x100)})), max_size=12
    )
)
def test_wrong_bytes_are_replaced_as_the_library_replaces_them(data: list[int]) -> None:
    tokens = [ALPHABET[byte] for byte in data]
    stage = Bytes(make_to_bytes())
    text = "".join("".join(stage.push([token])) for token in tokens) + "".join(stage.close(incomplete=True))
    assert text == bytes(data).decode("utf-8", "replace") == decoders.ByteLevel().decode(tokens)


def byte_ids(kind: str, data: bytes) -> list[int]:
    tokenizer = KINDS[kind]
    tokens = [ALPHABET[byte] if kind == "byte_level" else f"<0x{byte:02X}>" for byte in data]
    return [tokenizer.token_to_id(token) for token in tokens]


def test_a_character_of_byte_tokens_is_told_when_no_byte_can_spoil_it() -> None:
    stream = TextStream(DECODERS["byte_fallback"], skip_special_tokens=True)
    a = KINDS["byte_fallback"].token_to_id("a")
    assert [stream.push([token]) for token in [*byte_ids("byte_fallback", "🙂".encode()), a]] == ["", "", "", "", "🙂a"]
    # It is there to be looked at before.
    stream = TextStream(DECODERS["byte_fallback"], skip_special_tokens=True)
    ids = byte_ids("byte_fallback", "é".encode() + b"\xe4\xff\x41")
    assert [(stream.push([token]), stream.tail()) for token in ids] == [
        ("", ""), ("", "é"), ("", "é"), ("����", ""), ("�", ""),
    ]  # fmt: skip


def test_a_character_of_a_byte_level_vocabulary_waits_for_its_last_byte_and_no_longer() -> None:
    stream = TextStream(DECODERS["byte_level"], skip_special_tokens=True)
    assert [stream.push([token]) for token in byte_ids("byte_level", "é🙂".encode())] == ["", "é", "", "", "", "🙂"]
    assert [stream.push([token]) for token in byte_ids("byte_level", b"\xff\xe4A")] == ["�", "", "�A"]


def test_what_is_looked_at_of_a_run_that_does_not_end_is_bounded() -> None:
    stream = TextStream(DECODERS["byte_fallback"], skip_special_tokens=True)
    sizes = []
    for token in byte_ids("byte_fallback", "你".encode()) * 2000:
        assert stream.push([token]) == ""
        sizes.append(len(stream.tail()))
    assert max(sizes) == MAX_OPEN_BYTES // 3 and sizes[-1] == 0
    assert stream.close() == "你" * 2000


def test_a_decoder_that_tells_nothing_before_the_end_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    TokenDecoder(KINDS["byte_fallback"])
    assert not caplog.records
    decoder = TokenDecoder(KINDS["replaced_by_pattern"])
    assert "text comes at the end only" in caplog.text
    stream = TextStream(decoder, skip_special_tokens=True)
    assert stream.push(byte_ids("replaced_by_pattern", b"ab")) + stream.tail() == "" and stream.close() == "ab"


def test_bytes_of_a_token_are_its_own() -> None:
    level, fallback = DECODERS["byte_level"], DECODERS["byte_fallback"]
    token = byte_ids("byte_level", b"\xe4")[0]
    assert level.token_bytes(token) == b"\xe4"
    assert level.token_bytes(KINDS["byte_level"].token_to_id("<|user|>")) == b"<|user|>"
    assert level.token_bytes(NUM_IDS) is None
    assert fallback.token_bytes(KINDS["byte_fallback"].token_to_id("<0xE4>")) == b"\xe4"
    assert fallback.token_bytes(KINDS["byte_fallback"].token_to_id("▁b▁")) == b" b "
    assert DECODERS["word_piece"].token_bytes(KINDS["word_piece"].token_to_id("##s")) == b"s"
    assert DECODERS["word_piece"].token_bytes(KINDS["word_piece"].token_to_id("STOP")) == b" STOP"
    assert DECODERS["metaspace"].token_bytes(KINDS["metaspace"].token_to_id("▁a")) == b" a"


def test_a_strip_that_makes_the_library_panic() -> None:
    """More to strip from the end of a text than it has."""
    tokenizer = Tokenizer(models.WordLevel({"": 0, " ": 1, "a": 2}, ""))
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 1)])
    stream = TextStream(TokenDecoder(tokenizer), skip_special_tokens=False)
    assert stream.push([0, 1]) + stream.close() == ""
    stream = TextStream(TokenDecoder(tokenizer), skip_special_tokens=False)
    assert [stream.push([token]) for token in [1, 1, 2, 1, 2, 1, 1]] == ["", "", " a", "", " a", "", " "]
    assert stream.close() == ""


def test_a_panic_in_the_library_is_an_error_that_can_be_caught() -> None:
    """It is no `Exception` of its own."""
    strip = library_decode({"type": "Strip", "content": "a", "start": 0, "stop": 3})
    assert strip(["baaa"]) == "b"
    with pytest.raises(DecoderError, match="a decoder of the tokenizer failed"):
        strip(["aa"])
