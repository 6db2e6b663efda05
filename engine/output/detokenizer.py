"""Token ids to the text of one request: at once at the end, or piece by piece for a stream.

The pieces of a stream, joined, are exactly the text that a request without streaming gets: characters whose bytes are
not complete wait, and so does a tail that may turn out to be part of a stop string. Nobody looks for stop strings here; the
leader does (`scheduler/stop_checker.py`), and says where the text ends.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..io_struct import FinishReason, OutputOptions
from ..text.token_decoder import TextStream, TokenDecoder


class Detokenizer:
    """The text of one request's output."""

    def __init__(self, decoder: TokenDecoder | None, options: OutputOptions, stop: Sequence[str]) -> None:
        skip = options.skip_special_tokens
        self._stream = None if decoder is None else TextStream(decoder, skip_special_tokens=skip)
        self._no_stop_trim = options.no_stop_trim
        self._num_held_back = max(map(len, stop), default=1) - 1
        self._waiting = ""
        self._num_emitted = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens; returns the text that they settle and no stop string can take back."""
        if self._stream is None:
            return ""
        self._waiting += self._stream.push(token_ids)
        end = max(0, len(self._waiting) - self._num_held_back)
        piece, self._waiting = self._waiting[:end], self._waiting[end:]
        self._num_emitted += end
        return piece

    def finish(self, token_ids: Sequence[int], reason: FinishReason) -> str:
        """Add the last tokens; returns the rest of the text, cut where the leader says that it stopped.

        A stop token that matched leaves the text of those before it, a stop string what stands before it; with
        `no_stop_trim` the text is that of all tokens.
        """
        if self._stream is None:
            return ""
        if isinstance(reason.matched, int) and not self._no_stop_trim:
            token_ids = token_ids[:-1]
        rest = self._waiting + self._stream.push(token_ids) + self._stream.close()
        if reason.text_length is None or self._no_stop_trim:
            return rest
        return rest[: max(0, reason.text_length - self._num_emitted)]
