"""Stop strings: where a request ends and what text it leaves, against a search through the text of every prefix."""

from __future__ import annotations

import codecs
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_tokenizers import ADDED, KINDS, SPECIAL

from waybill.engine.io_struct import FinishReason, OutputOptions, SamplingParams
from waybill.engine.ipc.frontend_messages import TokenizedGenerateReqInput
from waybill.engine.output.detokenizer import Detokenizer
from waybill.engine.scheduler.req import Req
from waybill.engine.scheduler.stop_checker import StopChecker
from waybill.engine.scheduler.stop_search import StopSearch
from waybill.engine.text.token_decoder import TokenDecoder

DECODERS = {name: TokenDecoder(tokenizer) for name, tokenizer in KINDS.items()}
EOS = 1
LENGTH = 10_000
PLAIN = OutputOptions()


class Run(NamedTuple):
    """A request that was sampled these tokens, to its end."""

    num_tokens: int
    reason: FinishReason
    text: str
    streamed: str


def run(kind: str, ids: list[int], stop: tuple[str, ...], options: OutputOptions = PLAIN, **params: object) -> Run:
    """The leader's checks and the output processor's text, token by token."""
    sampling = SamplingParams(**{"max_new_tokens": LENGTH, "stop": stop, "ignore_eos": True, **params})  # type: ignore[arg-type]
    req = Req(TokenizedGenerateReqInput(0, "r", b"", sampling, options), bytearray())
    checker = StopChecker((EOS,), DECODERS[kind])
    stream = Detokenizer(DECODERS[kind], options, sampling.stop)
    streamed = ""
    for num, token in enumerate(ids, 1):
        req.output_ids.append(token)
        reason = checker.check(req)
        if reason is not None:
            return Run(num, reason, streamed + stream.finish([token], reason), streamed)
        streamed += stream.push([token])
    reason = FinishReason("length", length=len(ids))
    return Run(len(ids), reason, streamed + stream.finish([], reason), streamed)


def encode(kind: str, text: str) -> list[int]:
    return KINDS[kind].encode(text, add_special_tokens=False).ids


def byte_ids(kind: str, data: bytes) -> list[int]:
    """One token a byte."""
    decoder = DECODERS[kind]
    by_byte = {
        decoder.token_bytes(token): token
        for token in reversed(range(KINDS[kind].get_vocab_size()))
        if kind == "byte_level" or str(KINDS[kind].id_to_token(token)).startswith("<0x")
    }
    return [by_byte[bytes([byte])] for byte in data]


def special(kind: str, name: str) -> int:
    token: int = KINDS[kind].token_to_id(name)
    return token


# --- the slow reference -----------------------------------------------------------------------------------------------


def text_of(kind: str, ids: list[int], skip: bool) -> str:
    """Text of a prefix, without the character at its end that is not complete."""
    decoder = DECODERS[kind]
    visible = decoder.tokens(ids, skip_special_tokens=skip)
    if kind == "byte_level":
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        return utf8.decode(b"".join(decoder._to_bytes(token) for token in visible))
    bytes_at_end = 0
    while bytes_at_end < len(visible) and visible[-1 - bytes_at_end].startswith("<0x"):
        bytes_at_end += 1
    run_of_bytes = bytes(int(token[3:5], 16) for token in visible[len(visible) - bytes_at_end :])
    utf8 = codecs.getincrementaldecoder("utf-8")("strict")
    num_open = 0
    try:
        utf8.decode(run_of_bytes)
        num_open = len(utf8.getstate()[0])
    except UnicodeDecodeError:
        pass
    shown = visible[: len(visible) - num_open]
    return str(KINDS[kind].decode([KINDS[kind].token_to_id(token) for token in shown], skip_special_tokens=False))


def first_match(kind: str, ids: list[int], stops: tuple[str, ...], skip: bool, least: int) -> tuple[int, int] | None:
    """Tokens up to the first that completes a stop string in the caller's text, and where it begins."""
    before = ""
    for num in range(1, len(ids) + 1):
        text = text_of(kind, ids[:num], skip)
        known = len(before)
        if not text.startswith(before):
            known = next((i for i, (a, b) in enumerate(zip(text, before, strict=False)) if a != b), len(text))
        starts = [
            start
            for stop in stops
            for start in range(len(text))
            if text.startswith(stop, start) and start + len(stop) > known
        ]
        if starts and num >= least:
            return num, min(starts)
        before = text
    return None


PIECES = ["STOP", "ST", "O", "P", " ", "a", "é", "🙂", "你", "STOP🙂", "aa", "TO"]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "word_piece", "metaspace", "no_decoder"])
@settings(max_examples=80, deadline=None)
@given(data=st.data(), skip=st.booleans(), least=st.integers(0, 6), no_trim=st.booleans())
def test_the_first_stop_string_that_a_token_completes_ends_a_request(
    kind: str, data: st.DataObject, skip: bool, least: int, no_trim: bool
) -> None:
    size = KINDS[kind].get_vocab_size()
    named = [special(kind, name) for name in SPECIAL]
    part = st.one_of(
        st.sampled_from(PIECES).map(lambda text: encode(kind, text)),
        st.lists(st.one_of(st.integers(0, size + 2), st.sampled_from(named)), max_size=3),
    )
    ids = [token for tokens in data.draw(st.lists(part, min_size=1, max_size=7)) for token in tokens]
    stops = tuple(data.draw(st.lists(st.sampled_from([*PIECES, "P S", "\ufffd", "a a"]), min_size=1, max_size=3)))
    if not ids:
        return
    done = run(kind, ids, stops, OutputOptions(skip_special_tokens=skip, no_stop_trim=no_trim), min_new_tokens=least)
    expected = first_match(kind, ids, stops, skip, least)
    whole = KINDS[kind].decode(ids[: done.num_tokens], skip_special_tokens=skip)
    if expected is None:
        # No stop string here has a special token in it, but one may stand between two halves of a character.
        if done.reason.type == "length":
            assert done.text == whole
        else:
            assert skip and first_match(kind, ids, stops, False, least) is not None
    elif (done.num_tokens, done.reason.text_length) != expected:
        in_whole = first_match(kind, ids, stops, False, least)
        assert skip and in_whole is not None and in_whole[0] == done.num_tokens <= expected[0]
    else:
        assert done.text == (whole if no_trim else whole[: expected[1]])
        assert done.reason.matched in stops
        assert no_trim or whole.startswith(str(done.reason.matched), expected[1])
    assert done.text.startswith(done.streamed)


# --- examples ---------------------------------------------------------------------------------------------------------


def test_a_match_in_the_callers_text_comes_before_one_that_needs_a_special_token() -> None:
    """`<s> STOP` has a space that the caller's text, whose first one is stripped, has not."""
    ids = [special("metaspace", "<s>"), *encode("metaspace", "STOP")]
    done = run("metaspace", ids, (" ", "STOP"))
    assert (done.num_tokens, done.reason.matched, done.reason.text_length) == (2, "STOP", 0)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_match_before_min_new_tokens_ends_nothing_later(kind: str) -> None:
    ids = [*encode(kind, "a STOP"), *encode(kind, "b"), *encode(kind, "b"), *encode(kind, "a STOP"), *encode(kind, "b")]
    num_first = len(encode(kind, "a STOP"))
    done = run(kind, ids, ("STOP",), min_new_tokens=num_first + 1)
    assert done.num_tokens == len(ids) - len(encode(kind, "b"))
    assert done.text.count("STOP") == 1
    assert done.text == KINDS[kind].decode(ids)[: done.text.rindex("a") + 2]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "word_piece", "metaspace"])
@pytest.mark.parametrize("stop", ["<|user|>", "|user|>", "<|user|"])
def test_a_stop_string_may_be_of_a_special_token_that_is_no_text(kind: str, stop: str) -> None:
    ids = [*encode(kind, "a"), special(kind, "<|user|>"), *encode(kind, "STOP")]
    done = run(kind, ids, (stop,))
    assert done.num_tokens == len(encode(kind, "a")) + 1
    assert done.reason.matched == stop
    assert done.text == KINDS[kind].decode(encode(kind, "a"))


@pytest.mark.parametrize("stop", ["a<|user|>", "STOPa<|user|><|end|>b", "<|end|>b", "<|user|><|end|>"])
def test_a_stop_string_may_reach_over_special_tokens(stop: str) -> None:
    kind = "byte_level"
    ids = [*encode(kind, "aSTOPa"), special(kind, "<|user|>"), special(kind, "<|end|>"), *encode(kind, "bb")]
    done = run(kind, ids, ("bbb", stop))
    begin = "aSTOPa<|user|><|end|>b".index(stop)
    assert done.reason.matched == stop
    assert done.text == "aSTOPa"[:begin]
    assert done.text.startswith(done.streamed)


def test_with_special_tokens_in_the_text_they_are_found_once() -> None:
    kind = "byte_level"
    ids = [*encode(kind, "a"), special(kind, "<|user|>"), *encode(kind, "b")]
    done = run(kind, ids, ("user|>",), OutputOptions(skip_special_tokens=False))
    assert (done.num_tokens, done.text) == (len(ids) - 1, "a<|")
    kept = run(kind, ids, ("user|>",), OutputOptions(skip_special_tokens=False, no_stop_trim=True))
    assert kept.text == "a<|user|>"


@pytest.mark.parametrize("invisible", ["special", "unknown"])
def test_ids_without_text_do_not_come_between_the_ends_of_a_match(invisible: str) -> None:
    kind = "byte_level"
    nothing = special(kind, "<|end|>") if invisible == "special" else KINDS[kind].get_vocab_size() + 1
    ids = [*encode(kind, "a"), *byte_ids(kind, b"S"), *[nothing] * 5000, *byte_ids(kind, b"T"), *encode(kind, "a")]
    done = run(kind, ids, ("ST",))
    assert (done.num_tokens, done.text, done.streamed) == (len(ids) - 1, "a", "a")


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_half_a_character_is_no_replacement_character(kind: str) -> None:
    ids = [*encode(kind, "a"), *byte_ids(kind, "🙂é".encode()), *encode(kind, "b")]
    assert run(kind, ids, ("\ufffd",)).reason.type == "length"
    # What no byte can complete any more is one.
    wrong = [*encode(kind, "a"), *byte_ids(kind, b"\xe4"), *byte_ids(kind, b"\xff"), *encode(kind, "b")]
    done = run(kind, wrong, ("\ufffd",))
    assert (done.num_tokens, done.text) == (len(wrong) - len(encode(kind, "b")), "a")
    # A wrong byte behind a character: of byte-fallback tokens it spoils all of the run.
    spoilt = [*encode(kind, "a"), *byte_ids(kind, "é".encode() + b"\xff")]
    done = run(kind, spoilt, ("\ufffd",))
    assert (done.num_tokens, done.text) == (len(spoilt), "a" if kind == "byte_fallback" else "aé")
    cut = [*encode(kind, "a"), *byte_ids(kind, b"\xe4\xbd")]
    assert run(kind, cut, ("\ufffd",)).reason.type == "length"
    assert run(kind, cut, ("\ufffd",)).text == KINDS[kind].decode(cut)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_character_of_several_tokens_stops_with_its_last(kind: str) -> None:
    ids = [*encode(kind, "a"), *byte_ids(kind, "🙂".encode())]
    done = run(kind, [*ids, *encode(kind, "b")], ("🙂",))
    assert (done.num_tokens, done.text) == (len(ids), "a")


def test_of_several_matches_the_one_that_begins_first_counts() -> None:
    kind = "byte_level"
    one = special(kind, ADDED)
    for stops, matched, text in (
        (("ed", "dd"), "dd", "a"),
        (("dd", "dd ed"), "dd", "a"),
        (("dd ed", "dd"), "dd ed", "a"),
        (("zz", "é", " "), " ", "add"),
    ):
        done = run(kind, [one, one], stops)
        assert (done.num_tokens, done.reason.matched, done.text) == (1, matched, text)
        # As the dialect has it: the text of all tokens, also of what the last one brought behind the match.
        assert run(kind, [one, one], stops, OutputOptions(no_stop_trim=True)).text == ADDED


def test_the_space_that_begins_a_sentencepiece_text_is_not_there() -> None:
    kind = "byte_fallback"
    tokens = [KINDS[kind].token_to_id("▁"), *encode(kind, "STOP")[1:]]
    assert KINDS[kind].decode(tokens).startswith("STOP")
    assert run(kind, tokens, (" STOP",)).reason.type == "length"
    done = run(kind, [*encode(kind, "a"), *tokens], (" STOP",))
    assert (done.reason.matched, done.text) == (" STOP", "a")


def test_a_stop_token_wins_over_a_string_and_its_text_is_cut() -> None:
    kind = "byte_level"
    end = special(kind, "<|end|>")
    done = run(
        kind, [*encode(kind, "ab"), end], ("<|end|>",), OutputOptions(skip_special_tokens=False), stop_token_ids=(end,)
    )
    assert (done.reason.matched, done.text) == (end, "ab")


def test_a_check_costs_the_same_at_any_length() -> None:
    """What is looked at, and what is kept, does not grow with the output."""
    kind = "byte_level"
    search = StopSearch(DECODERS[kind], ("xyz", "y" * 20), skip_special_tokens=True)
    tokens = [*encode(kind, "a STOP"), special(kind, "<|end|>"), KINDS[kind].get_vocab_size() + 1] * 500
    tokens += [KINDS[kind].get_vocab_size() + 1] * 500
    sizes = []
    for token in tokens:
        assert search.push(token) is None
        assert search._whole is not None
        sizes.append(len(search._text.window) + len(search._whole.window) + len(search._lengths))
    assert max(sizes) < 150
