"""The stages of `decoder_stages` whose elements are bytes: characters may lie in several of them."""

from __future__ import annotations

import codecs
import copy
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Self

from tokenizers.pre_tokenizers import ByteLevel

REPLACEMENT = "\ufffd"
# As the library parses a hexadecimal byte.
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")
# A run of byte tokens is looked at while it lasts up to this length, and a longer one when it has ended.
MAX_OPEN_BYTES = 4096
NUM_CACHED_TOKENS = 1 << 16


class ByteRuns:
    """`ByteFallback`: a run of tokens `<0xE4>` is text if all of it is UTF-8, else every byte of it is U+FFFD. So a run is
    settled by its end or by its first wrong byte."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._texts: list[str] = []
        self._num_bytes = 0
        self._is_wrong = False

    @property
    def holds(self) -> bool:
        return not self._is_wrong and 0 < self._num_bytes <= MAX_OPEN_BYTES

    def push(self, elements: Sequence[str]) -> list[str]:
        texts: list[str] = []
        for element in elements:
            byte = BYTE_TOKEN.fullmatch(element)
            if byte is not None:
                texts += self._add(int(byte[1], 16))
                continue
            if self._num_bytes:
                texts += self.close(incomplete=True)
                self._start()
            texts.append(element)
        return texts

    def _add(self, byte: int) -> list[str]:
        self._num_bytes += 1
        if self._is_wrong:
            return [REPLACEMENT]
        try:
            self._texts.append(self._utf8.decode(bytes([byte])))
        except UnicodeDecodeError:
            self._is_wrong = True
            return [REPLACEMENT] * self._num_bytes
        return []

    def close(self, *, incomplete: bool) -> list[str]:
        if self._is_wrong or not self._num_bytes:
            return []
        if incomplete and self._utf8.getstate()[0]:
            return [REPLACEMENT] * self._num_bytes
        return ["".join(self._texts)]

    def fork(self) -> Self:
        other = copy.copy(self)
        other._utf8, other._texts = copy.copy(self._utf8), list(self._texts)
        return other


class Bytes:
    """`ByteLevel`: every character of an element is a byte; bytes that are no UTF-8 are U+FFFD. Fuses."""

    holds = False

    def __init__(self, to_bytes: Callable[[str], bytes]) -> None:
        self._to_bytes = to_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, elements: Sequence[str]) -> list[str]:
        return [self._utf8.decode(b"".join(map(self._to_bytes, elements)))]

    def close(self, *, incomplete: bool) -> list[str]:
        return [self._utf8.decode(b"", final=True)] if incomplete else []

    def fork(self) -> Self:
        other = copy.copy(self)
        other._utf8 = copy.copy(self._utf8)
        return other


def byte_alphabet() -> dict[str, int]:
    """Characters in which byte-level tokenizers write bytes. Printable bytes stand for themselves, the others follow in
    order."""
    characters = sorted(ByteLevel.alphabet())
    own = {character: ord(character) for character in characters if ord(character) < 256}
    others = sorted(set(range(256)) - set(own.values()))
    return own | dict(zip(characters[len(own) :], others, strict=True))


def make_to_bytes() -> Callable[[str], bytes]:
    alphabet = byte_alphabet()

    @lru_cache(NUM_CACHED_TOKENS)
    def to_bytes(token: str) -> bytes:
        """A token with a character beyond the alphabet was added as text."""
        try:
            return bytes([alphabet[character] for character in token])
        except KeyError:
            return token.encode()

    return to_bytes
