"""The decoders of the `tokenizers` library, piece by piece: each takes elements (tokens as text) and yields settled text.

The library decodes a whole list. Here every decoder of a tokenizer's chain is a stage that is fed as tokens come: what the
stages yield, joined, is exactly what the library makes of all tokens at once, at a cost per token that does not grow.
A stage holds back what a later token could still change. An element's own text is the library's.

After a stage that fuses, the following ones see pieces of one growing element.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, Protocol, Self

from tokenizers import Tokenizer

from .byte_stages import ByteRuns, Bytes, make_to_bytes

NUM_CACHED_ELEMENTS = 1 << 16

Decode = Callable[[Sequence[str]], str]
MakeStage = Callable[[], "Stage"]


class Stage(Protocol):
    """One decoder of a chain, for one text."""

    @property
    def holds(self) -> bool:
        """Whether it holds back text that is complete so far."""
        ...

    def push(self, elements: Sequence[str]) -> list[str]:
        """What is settled with these elements."""
        ...

    def close(self, *, incomplete: bool) -> list[str]:
        """What remains at the end; a character whose bytes are not complete only with `incomplete`."""
        ...

    def fork(self) -> Self:
        """A copy that goes on from here by itself."""
        ...


class Each:
    """Every element by itself, but for the first: no decoder, `WordPiece`, `Metaspace`, `Replace`, `Strip`."""

    holds = False

    def __init__(self, first: Callable[[str], str], later: Callable[[str], str]) -> None:
        self._next = first
        self._later = later

    def push(self, elements: Sequence[str]) -> list[str]:
        texts = []
        for element in elements:
            texts.append(self._next(element))
            self._next = self._later
        return texts

    def close(self, *, incomplete: bool) -> list[str]:
        return []

    def fork(self) -> Self:
        return copy.copy(self)


class WordEnds:
    """`BPEDecoder`: the end of a word is a space, but for the last word."""

    def __init__(self, inner: Callable[[str], str], last: Callable[[str], str]) -> None:
        self._inner, self._last = inner, last
        self._waiting: str | None = None

    @property
    def holds(self) -> bool:
        return self._waiting is not None

    def push(self, elements: Sequence[str]) -> list[str]:
        texts = []
        for element in elements:
            if self._waiting is not None:
                texts.append(self._inner(self._waiting))
            self._waiting = element
        return texts

    def close(self, *, incomplete: bool) -> list[str]:
        return [] if self._waiting is None else [self._last(self._waiting)]

    def fork(self) -> Self:
        return copy.copy(self)


class Repeats:
    """`CTC`: an element that repeats the one before it is none, nor is one without text."""

    holds = False

    def __init__(self, decode: Callable[[str], str]) -> None:
        self._decode = decode
        self._previous: str | None = None

    def push(self, elements: Sequence[str]) -> list[str]:
        texts = []
        for element in elements:
            if element != self._previous and (text := self._decode(element)):
                texts.append(text)
            self._previous = element
        return texts

    def close(self, *, incomplete: bool) -> list[str]:
        return []

    def fork(self) -> Self:
        return copy.copy(self)


class Ends:
    """`Strip` of a fused text: up to `start` characters of its beginning, up to `stop` of its end."""

    def __init__(self, content: str, start: int, stop: int) -> None:
        self._content = content
        self._num_to_strip = start
        self._stop = stop
        self._waiting = ""

    @property
    def holds(self) -> bool:
        return bool(self._waiting)

    def push(self, elements: Sequence[str]) -> list[str]:
        text = "".join(elements)
        if text and self._num_to_strip:
            stripped = strip(text, self._content, self._num_to_strip, 0)
            self._num_to_strip = 0 if stripped else self._num_to_strip - len(text)
            text = stripped
        text = self._waiting + text
        settled = strip(text, self._content, 0, self._stop)
        self._waiting = text[len(settled) :]
        return [settled]

    def close(self, *, incomplete: bool) -> list[str]:
        return []

    def fork(self) -> Self:
        return copy.copy(self)


class Whole:
    """Decoders that cannot be told piece by piece, as replacing a pattern in a fused text: all of it comes at the end."""

    holds = False

    def __init__(self, decode: Decode, *, fused: bool) -> None:
        self._decode = decode
        self._fused = fused
        self._elements: list[str] = []

    def push(self, elements: Sequence[str]) -> list[str]:
        self._elements += elements
        return []

    def close(self, *, incomplete: bool) -> list[str]:
        if not self._elements or not incomplete:
            return []
        return [self._decode(["".join(self._elements)] if self._fused else self._elements)]

    def fork(self) -> Self:
        other = copy.copy(self)
        other._elements = list(self._elements)
        return other


def strip(text: str, content: str, start: int, stop: int) -> str:
    """`text` without up to `start` leading and up to `stop` trailing characters `content`."""
    first = 0
    while first < min(start, len(text)) and text[first] == content:
        first += 1
    end = len(text)
    while end > max(first, len(text) - stop) and text[end - 1] == content:
        end -= 1
    return text[first:end]


class DecoderError(RuntimeError):
    """A decoder of the `tokenizers` library failed on what a model has sampled."""


def library_decode(spec: dict[str, Any]) -> Decode:
    """The library's own decoder, from its form in `tokenizer.json`."""
    model = {"type": "BPE", "vocab": {}, "merges": []}
    decoder = Tokenizer.from_str(json.dumps({"version": "1.0", "model": model, "decoder": spec})).decoder

    def decode(elements: Sequence[str]) -> str:
        try:
            return decoder.decode(list(elements))
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:
            # A panic in the library is no `Exception`.
            raise DecoderError(f"a decoder of the tokenizer failed: {error}") from error

    return decode


def make_stages(spec: dict[str, Any] | None) -> list[MakeStage]:
    """What makes the stages of a tokenizer's `decoder`, as it stands in `tokenizer.json`; None joins with spaces."""
    if spec is None:
        return [partial(Each, str, " {}".format)]
    makers: list[MakeStage] = []
    fused = False
    specs = list(_flatten(spec))
    for index, part in enumerate(specs):
        make = _fused_stage(part) if fused else _stage(part)
        if make is None:
            rest = library_decode({"type": "Sequence", "decoders": specs[index:]})
            return [*makers, partial(Whole, rest, fused=fused)]
        if part["type"] != "Fuse":
            makers.append(make)
        fused = fused or part["type"] in ("Fuse", "ByteLevel")
    return makers


def _flatten(spec: dict[str, Any]) -> list[dict[str, Any]]:
    if spec["type"] != "Sequence":
        return [spec]
    return [part for inner in spec["decoders"] for part in _flatten(inner)]


def _stage(spec: dict[str, Any]) -> MakeStage | None:
    match spec["type"]:
        case "ByteLevel":
            return partial(Bytes, make_to_bytes())
        case "ByteFallback":
            return ByteRuns
        case "Fuse":
            return partial(Each, str, str)
        case "Strip":
            one = partial(strip, content=spec["content"], start=spec["start"], stop=spec["stop"])
            return partial(Each, one, one)
        case "WordPiece" | "Metaspace" | "Replace":
            decode = library_decode(spec)
            return partial(Each, _cached(lambda token: decode([token])), _cached(lambda token: decode(["", token])))
        case "BPEDecoder":
            decode = library_decode(spec)
            return partial(WordEnds, _cached(lambda token: decode([token, ""])), _cached(lambda token: decode([token])))
        case "CTC":
            decode = library_decode(spec)
            return partial(Repeats, _cached(lambda token: decode([token])))
        case _:
            return None


def _fused_stage(spec: dict[str, Any]) -> MakeStage | None:
    match spec["type"]:
        case "Fuse":
            return partial(Each, str, str)
        case "Strip":
            return partial(Ends, spec["content"], spec["start"], spec["stop"])
        case "Replace" if len(spec["pattern"].get("String", "")) == 1:
            return _stage(spec)
        case _:
            return None


def _cached(decode: Callable[[str], str]) -> Callable[[str], str]:
    return lru_cache(NUM_CACHED_ELEMENTS)(decode)
