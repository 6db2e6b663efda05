"""The text of special tokens, taken as text: `split_special_tokens`.

A tokenizer finds its added tokens wherever their text stands. Here private characters hide the special tokens' text that a
caller wrote, and what the tokenizer then finds in the prompt is what the template wrote. The prompt is tokenised as it is,
by the same model, with these tokens alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer, models

from ..validation.field_error import FieldError
from ..validation.request_model import has_surrogate

# What no standard gives a meaning.
PRIVATE_CHARS = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
# DeepSeek's `<｜User｜>` and others are not marked as special, and yet begin a turn.
CONTROL_FORM = re.compile(r"<[|｜].+[|｜]>", re.DOTALL)
# No added token is empty.
REST = ""


@dataclass(frozen=True)
class FoundToken:
    """An added token in characters [start, end) of a text, with the white space that it takes."""

    start: int
    end: int
    token_id: int
    token: AddedToken

    def own_part(self, text: str) -> range:
        """Without white space on its sides; all of it where a normaliser has found it in another form."""
        start = text.find(self.token.content, self.start, self.end)
        return range(self.start, self.end) if start < 0 else range(start, start + len(self.token.content))


def unused_chars(taken: set[str]) -> Iterator[str]:
    return (char for codes in PRIVATE_CHARS for char in map(chr, codes) if char not in taken)


def take_char(unused: Iterator[str]) -> str:
    char = next(unused, None)
    if char is None:
        raise FieldError("text: has every private-use character, so split_special_tokens cannot be kept", "text")
    return char


class SpecialTokens:
    """The added tokens of a tokenizer, and which of them are special: those that it marks so, and those of the form of
    control tokens, `<|user|>`. May be used from several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """
        Raises:
            ValueError: the tokenizer does more to a text than to tokenise it.
        """
        if tokenizer.truncation is not None or tokenizer.padding is not None:
            raise FieldError("text: the tokenizer truncates or pads, so split_special_tokens must be false", "text")
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        # With the tokenizer's own rules, and no other token to look for.
        self._finder = Tokenizer(models.WordLevel({REST: 0}, REST))
        if tokenizer.normalizer is not None:
            self._finder.normalizer = tokenizer.normalizer
        self._finder.add_tokens(list(added.values()))
        ids = {token.content: token_id for token_id, token in added.items()}
        found = self._finder.get_added_tokens_decoder()
        self._found = {number: (ids[token.content], token) for number, token in found.items()}
        special = {one.content for one in added.values() if one.special or CONTROL_FORM.fullmatch(one.content)}
        self._special = {ids[content]: content for content in special}
        self._beginnings = {content[:length] for content in special for length in range(1, len(content))}
        self._longest = max(map(len, self._beginnings), default=0)
        # Letters and digits stand everywhere.
        self._edges = {char for content in special for char in (content[0], content[-1]) if not char.isalnum()}
        self._contents = set("".join(ids))

    def find(self, text: str) -> list[FoundToken]:
        (encoding,) = self._finder.encode_batch([text], add_special_tokens=False)
        return [
            FoundToken(start, end, *self._found[number])
            for number, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if number in self._found
        ]

    def num_special(self, text: str) -> int:
        return sum(one.token_id in self._special for one in self.find(text))

    def mask(self, text: str) -> SpecialTextMask:
        """Of what stands in `text`."""
        return SpecialTextMask(self.special_chars, unused_chars(self._contents | set(text)))

    def edge_mask(self, text: str) -> SpecialTextMask:
        """Also of whatever a special token may begin or end with, so that none comes about of what is left of a text."""
        return SpecialTextMask(self.edge_chars, unused_chars(self._contents | set(text)))

    def edge_chars(self, text: str) -> set[int]:
        return self.special_chars(text) | {place for place, char in enumerate(text) if char in self._edges}

    def special_chars(self, text: str) -> set[int]:
        """Where special tokens have their characters. Of those that what follows the text might complete, the first one."""
        chars = {place for one in self.find(text) if one.token_id in self._special for place in one.own_part(text)}
        # Templates cut white space off.
        kept = len(text.rstrip())
        tails = {kept - length for length in range(1, min(self._longest, kept) + 1)}
        return chars | {start for start in tails if text[start:kept] in self._beginnings}

    def encode(self, text: str, masked: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of `text`, in which those added tokens are found that `masked` has in the same place.

        Raises:
            ValueError: the tokenizer would find others.
        """
        found = self.find(masked)
        unused = unused_chars(self._contents | set(text))
        names = {token_id: take_char(unused) for token_id in sorted({one.token_id for one in found})}
        pieces: list[str] = []
        end = 0
        for one in found:
            part = one.own_part(text)
            pieces += (text[end : part.start], names[one.token_id])
            end = part.stop
        renamed = "".join([*pieces, text[end:]])
        tokens = {names[one.token_id]: one.token for one in found}
        by_name = self._knowing(tokens)
        (encoding,) = by_name.encode_batch([renamed], add_special_tokens=add_special_tokens)
        numbers = {by_name.token_to_id(name) for name in tokens}
        special = dict(self._special_in(encoding, renamed, numbers, {name: one for one, name in names.items()}))
        if list(special.values()) != [one.token_id for one in found]:
            raise FieldError(
                "text: the tokenizer cannot take its special tokens as text (split_special_tokens)", "text"
            )
        return [special.get(place, token_id) for place, token_id in enumerate(encoding.ids)]

    def _knowing(self, tokens: dict[str, AddedToken]) -> Tokenizer:
        """The same model with other added tokens: under each name the token that it stands for."""
        made = Tokenizer(self._tokenizer.model)
        made.normalizer = self._tokenizer.normalizer
        made.pre_tokenizer = self._tokenizer.pre_tokenizer
        made.post_processor = self._tokenizer.post_processor
        made.add_tokens(
            [
                AddedToken(
                    name,
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=token.normalized,
                )
                for name, token in tokens.items()
            ]
        )
        return made

    def _special_in(
        self, encoding: Encoding, text: str, numbers: set[int | None], names: dict[str, int]
    ) -> Iterator[tuple[int, int]]:
        """Places and ids of the tokens that stand for others, and of special ones that the model has made of their text."""
        looked_at = numbers | self._special.keys()
        tokens, offsets, is_put = encoding.tokens, encoding.offsets, encoding.special_tokens_mask
        for place, token_id in enumerate(encoding.ids):
            if token_id not in looked_at or is_put[place]:
                continue
            # A token of the model may have the number of one that stands for another.
            name = next((char for char in tokens[place] if char in names), None)
            if name is not None:
                yield place, names[name]
            elif token_id in self._special and self._special[token_id] in text[slice(*offsets[place])]:
                yield place, token_id


class SpecialTextMask:
    """Hides special tokens' text in what goes into one prompt, the characters at the `places` of each text. Texts keep
    their length, and all their other characters."""

    def __init__(self, places: Callable[[str], set[int]], unused: Iterator[str]) -> None:
        self._places = places
        self._unused = unused
        self._masks: dict[str, str] = {}

    def hide(self, value: Any) -> Any:
        """A value as JSON has it, with everything hidden that its strings have."""
        if isinstance(value, str):
            return self._hide_in(value)
        if isinstance(value, dict):
            return {self.hide(name): self.hide(item) for name, item in value.items()}
        return list(map(self.hide, value)) if isinstance(value, list | tuple) else value

    def show(self, text: str) -> str:
        return text.translate({ord(mask): char for char, mask in self._masks.items()})

    def _hide_in(self, text: str) -> str:
        # Refused where it is tokenised.
        if has_surrogate(text):
            return text
        places = self._places(text)
        if not places:
            return text
        chars = list(text)
        for place in places:
            char = chars[place]
            if char not in self._masks:
                self._masks[char] = take_char(self._unused)
            chars[place] = self._masks[char]
        return "".join(chars)
