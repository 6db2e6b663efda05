"""How many characters of text one token can stand for at most: what is longer than that times the context cannot fit.

Sound or absent: a text that fits is never refused. Where a tokenizer may drop text, or put one token for a run of any
length, there is no bound, and texts are tokenised whole.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

# Composing to NFC or NFKC leaves at least a quarter of the characters: none decomposes into more than four, and decomposing
# makes no text shorter. ASCII stays as it is.
COMPOSITION = 4
KEEP_LENGTH = ("NFD", "NFKD", "Lowercase", "Prepend", "ByteLevel")
COMPOSE = ("NFC", "NFKC")
NUM_BYTES = 256


@dataclass(frozen=True)
class TextBound:
    """`chars` of normalised text a token at most; normalising leaves at least one of `shrinks` characters of a text that is
    not ASCII."""

    chars: int
    shrinks: int

    def min_tokens(self, text: str) -> int:
        """A text has so many tokens at least."""
        chars = self.chars if text.isascii() else self.chars * self.shrinks
        return -(-len(text) // chars)


def text_bound(tokenizer: Tokenizer) -> TextBound | None:
    """The bound of a tokenizer, from its own description; None where it has none."""
    description: dict[str, Any] = json.loads(tokenizer.to_str())
    normalizers = _steps(description["normalizer"], "normalizers")
    pre_tokenizers = _steps(description["pre_tokenizer"], "pretokenizers")
    model, added = description["model"], description["added_tokens"]
    steps = [*normalizers, *pre_tokenizers]
    if (
        description["truncation"] is not None
        or not all(map(_keeps_length, normalizers))
        or not all(map(_keeps_text, pre_tokenizers))
        or not _stands_for_what_it_says(model, any(step["type"] == "ByteLevel" for step in steps))
        # Such a token takes the white space beside it, as much as there is.
        or any(token["lstrip"] or token["rstrip"] for token in added)
    ):
        return None
    contents = [token["content"] for token in added]
    if tokenizer.normalizer is not None:
        contents += [tokenizer.normalizer.normalize_str(content) for content in contents]
    longest = max(map(len, [*model["vocab"], *contents]))
    return TextBound(longest, COMPOSITION ** sum(step["type"] in COMPOSE for step in normalizers))


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return [step for one in part[inner] for step in _steps(one, inner)] if part["type"] == "Sequence" else [part]


def _keeps_length(normalizer: dict[str, Any]) -> bool:
    """But for composition, which `TextBound` counts."""
    if normalizer["type"] == "Replace":
        pattern = normalizer["pattern"].get("String")
        return pattern is not None and len(normalizer["content"]) >= len(pattern)
    return normalizer["type"] in (*KEEP_LENGTH, *COMPOSE)


def _keeps_text(pre_tokenizer: dict[str, Any]) -> bool:
    kind = pre_tokenizer["type"]
    return kind in ("ByteLevel", "Metaspace", "Digits") or (
        kind in ("Split", "Punctuation") and pre_tokenizer["behavior"] != "Removed"
    )


def _stands_for_what_it_says(model: dict[str, Any], is_byte_level: bool) -> bool:
    """Every character becomes part of a token of the vocabulary, or a token of its own."""
    if model["type"] != "BPE":
        # Others put one token for an unknown word of any length.
        return False
    if is_byte_level:
        return _has_bytes(model["vocab"])
    if model["byte_fallback"]:
        return all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(NUM_BYTES))
    return model["unk_token"] is not None and not model["fuse_unk"]


def _has_bytes(vocab: dict[str, int]) -> bool:
    """Whether the alphabet in which a byte-level tokenizer writes bytes is whole."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = range(NUM_BYTES, NUM_BYTES + NUM_BYTES - len(printable))
    return all(chr(code) in vocab for code in [*printable, *others])
