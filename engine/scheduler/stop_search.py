"""Finds stop strings in one request's output while it grows, at a cost per token that does not depend on its length."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ..text.token_decoder import TextStream, TokenDecoder


@dataclass(frozen=True)
class StopMatch:
    """A stop string that was found, and how many characters of the caller's text stand before it."""

    stop: str
    text_length: int


class GrowingText:
    """The end of one text: what is new in it, and enough of what stood before to find a string that ends in what is new.

    The text is that of all tokens so far, without a character whose bytes are not complete.
    """

    def __init__(self, stream: TextStream, num_kept: int) -> None:
        self._stream = stream
        self._num_kept = num_kept
        self._kept = ""
        self._tail = ""
        self._num_settled = 0
        # Characters of the whole text.
        self.length = 0
        # What is looked at: `window` begins at character `start` of the text, its new part at `first_new` of that.
        self.window = ""
        self.start = 0
        self.first_new = 0

    def push(self, token_id: int) -> None:
        settled = self._stream.push([token_id])
        tail = self._stream.tail()
        if not (settled + tail).startswith(self._tail):
            # A byte that does not fit has turned the characters before it into others.
            self.length = self._num_settled
        self.start = self._num_settled - len(self._kept)
        self.window = self._kept + settled + tail
        self.first_new = self.length - self.start
        kept = self._kept + settled
        self._kept = kept[max(0, len(kept) - self._num_kept) :]
        self._tail = tail
        self._num_settled += len(settled)
        self.length = self._num_settled + len(tail)

    def find(self, string: str) -> int | None:
        """Where `string` begins in the text, if it ends within what the last token brought."""
        found = self.window.find(string, max(0, self.first_new - len(string) + 1))
        return None if found < 0 else self.start + found


class StopSearch:
    """Looks for stop strings in the text that the caller gets, and in the same text with its special tokens.

    Of several matches that one token completes the one that begins first counts, then one in the caller's text, then the
    one that stands first in the request.
    """

    def __init__(self, decoder: TokenDecoder, stops: Sequence[str], *, skip_special_tokens: bool) -> None:
        self._stops = stops
        num_kept = max(map(len, stops)) - 1
        self._text = GrowingText(TextStream(decoder, skip_special_tokens=skip_special_tokens), num_kept)
        self._whole: GrowingText | None = None
        if skip_special_tokens:
            self._whole = GrowingText(TextStream(decoder, skip_special_tokens=False), num_kept)
        # Lengths of both texts after each token that lies in the window of the one with special tokens.
        self._lengths: deque[tuple[int, int]] = deque([(0, 0)])

    def push(self, token_id: int) -> StopMatch | None:
        """Add a token; returns the match that ends within its text."""
        self._text.push(token_id)
        found = [
            (start, False, order)
            for order, stop in enumerate(self._stops)
            if (start := self._text.find(stop)) is not None
        ]
        if self._whole is not None:
            self._whole.push(token_id)
            self._note_lengths(self._whole)
            # Most of the time there is no special token in sight.
            if (self._whole.window, self._whole.first_new) != (self._text.window, self._text.first_new):
                found += [
                    (self._in_text(start), True, order)
                    for order, stop in enumerate(self._stops)
                    if (start := self._whole.find(stop)) is not None
                ]
        if not found:
            return None
        start, _, order = min(found)
        return StopMatch(self._stops[order], start)

    def _note_lengths(self, whole: GrowingText) -> None:
        lengths = self._lengths
        while len(lengths) > 1 and lengths[-1][0] >= whole.length:
            lengths.pop()
        lengths.append((whole.length, self._text.length))
        while len(lengths) > 1 and lengths[1][0] <= whole.start:
            lengths.popleft()

    def _in_text(self, start: int) -> int:
        """Where character `start` of the text with special tokens stands in the text without them."""
        end = self._lengths[-1][1]
        for whole_length, text_length in reversed(self._lengths):
            if whole_length <= start:
                return min(text_length + start - whole_length, end)
            end = text_length
        return 0
