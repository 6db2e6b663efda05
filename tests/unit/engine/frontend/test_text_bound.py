"""The bound on characters a token never refuses a text that fits, and is absent where it could."""

from __future__ import annotations

import json
import sys
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from waybill.engine.frontend.text_bound import COMPOSITION, text_bound
from waybill.engine.frontend.text_codec import MAX_HELD_CHARS, TextCodec
from waybill.engine.text.tokenizer_file import load_tokenizer
from waybill.launch.args import EMBEDDED_MODEL

CORPUS = ["the quick brown fox    jumps over the lazy dog", "ünïcödé e\u0301e\u0301 한국어 =========== \n\n\n\n"] * 20


def byte_level(normalizer: Any = None, added: AddedToken | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([added or AddedToken("<|a longer special token|>", normalized=False)])
    return tokenizer


def byte_fallback(*, whole: bool = True) -> Tokenizer:
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256 if whole else 200)}
    vocab |= {token: len(vocab) + index for index, token in enumerate(["▁", "a", "b", "ab", "▁ab", "<unk>"])}
    merges = [("a", "b"), ("▁", "ab")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.ByteFallback()
    return tokenizer


def word_level() -> Tokenizer:
    return Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))


def truncating() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.enable_truncation(5)
    return tokenizer


def without_white_space() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()])
    return tokenizer


BOUNDED = {
    "embedded": load_tokenizer(str(EMBEDDED_MODEL)),
    "byte level": byte_level(),
    "composing": byte_level(normalizers.NFC()),
    "compatible": byte_level(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
    "byte fallback": byte_fallback(),
}
BOUNDS = {name: text_bound(tokenizer) for name, tokenizer in BOUNDED.items() if tokenizer is not None}
PIECES = [
    *("a", "ab", "the", " ", "    ", "\n\n", "e\u0301", "\u1112\u1161\u11ab", "\u1f82", "ﷺ", "=====", "😀", "\0", "ÿ"),
    *("<|a longer", "<|a longer special token|>", "\u03b1\u0313\u0300\u0345", "\u212b"),
]


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(list(BOUNDED)), text=st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_no_text_has_fewer_tokens_than_the_bound_says(name: str, text: str) -> None:
    tokenizer = BOUNDED[name]
    assert tokenizer is not None
    bound = BOUNDS[name]
    assert bound is not None
    assert bound.min_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False))


def test_no_character_decomposes_into_more_than_the_bound_allows() -> None:
    longest = max(len(unicodedata.normalize("NFD", chr(code))) for code in range(0xD800))
    longest = max(longest, *(len(unicodedata.normalize("NFD", chr(c))) for c in range(0xE000, sys.maxunicode + 1)))
    assert longest == COMPOSITION


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_level(normalizers.Strip()),
        byte_level(normalizers.Replace("  ", " ")),
        byte_level(normalizers.StripAccents()),
        byte_level(added=AddedToken("<x>", rstrip=True)),
        byte_fallback(whole=False),
        word_level(),
        truncating(),
        without_white_space(),
    ],
    ids=["strip", "shorter", "accents", "rstrip", "no bytes", "words", "truncation", "white space"],
)
def test_where_text_may_vanish_there_is_no_bound(tokenizer: Tokenizer) -> None:
    assert text_bound(tokenizer) is None


class Counting:
    """A tokenizer that counts what it is asked to do."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.inner, self.num_encoded = tokenizer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def encode(self, *arguments: Any, **options: Any) -> Any:
        self.num_encoded += 1
        return self.inner.encode(*arguments, **options)

    def encode_batch_fast(self, *arguments: Any, **options: Any) -> Any:
        self.num_encoded += 1
        return self.inner.encode_batch_fast(*arguments, **options)


def test_what_cannot_fit_is_not_tokenised() -> None:
    tokenizer = Counting(byte_level())
    codec = TextCodec(tokenizer)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"the prompt has 100000 characters, so at least \d+ tokens: must have at most 5"
    ):
        codec.encode("x" * 100_000, max_tokens=5)
    assert tokenizer.num_encoded == 0
    with pytest.raises(ValueError, match="the prompt has 7 tokens: must have at most 6"):
        codec.encode("0123456", max_tokens=6)
    assert codec.encode("0123456", max_tokens=7)


def test_long_texts_have_the_ids_and_the_text_of_short_ones() -> None:
    """They are tokenised another way, which lets other threads run."""
    for tokenizer in BOUNDED.values():
        assert tokenizer is not None
        codec = TextCodec(tokenizer)
        text = "".join(PIECES) * (1 + MAX_HELD_CHARS // len("".join(PIECES)))
        ids = codec.encode(text)
        assert len(text) > MAX_HELD_CHARS and ids == tokenizer.encode(text).ids
        assert codec.decode(ids * 3, skip_special_tokens=False) == tokenizer.decode(ids * 3, skip_special_tokens=False)


def test_the_description_is_one_that_the_library_still_writes() -> None:
    description = json.loads(byte_level().to_str())
    assert {"truncation", "normalizer", "pre_tokenizer", "model", "added_tokens"} <= set(description)
