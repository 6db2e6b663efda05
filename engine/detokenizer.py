"""Token ids to text: at once at the end, or piece by piece for a stream.

The pieces of a stream, joined, are exactly the text that a request without streaming gets: characters whose bytes are
not complete wait, and so does a tail that may turn out to be part of a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from .io_struct import FinishReason


def load_tokenizer(path: str) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder; None where it has none, and then there is no text."""
    file = Path(path) / "tokenizer.json"
    return Tokenizer.from_file(str(file)) if file.is_file() else None


class Detokenizer:
    """The text of one request's output."""

    def __init__(
        self, tokenizer: Tokenizer | None, *, skip_special_tokens: bool, no_stop_trim: bool, stop: Sequence[str]
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._no_stop_trim = no_stop_trim
        self._num_held_back = max(map(len, stop), default=1) - 1
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._streamed = ""
        self._num_emitted = 0
        self.token_ids: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens; returns the text that they settle."""
        if self._tokenizer is not None:
            for token_id in token_ids:
                self._streamed += self._stream.step(self._tokenizer, token_id) or ""
        self.token_ids.extend(token_ids)
        end = max(self._num_emitted, len(self._streamed) - self._num_held_back)
        piece = self._streamed[self._num_emitted : end]
        self._num_emitted = end
        return piece

    def finish(self, token_ids: Sequence[int], reason: FinishReason) -> str:
        """Add the last tokens; returns the rest of the text, cut where the request stopped."""
        self.token_ids.extend(token_ids)
        return self._text(reason)[self._num_emitted :]

    def _text(self, reason: FinishReason) -> str:
        """The whole text of a finished request."""
        ids = self.token_ids
        if self._no_stop_trim or reason.type != "stop":
            return self._decode(ids)
        if isinstance(reason.matched, int):
            return self._decode(ids[:-1])
        assert reason.matched is not None
        text = self._decode(ids)
        # The match ends within the last token's text: what matches earlier came before `min_new_tokens`.
        earliest = max(0, len(self._decode(ids[:-1])) - len(reason.matched) + 1)
        found = text.find(reason.matched, earliest)
        return text if found < 0 else text[:found]

    def _decode(self, ids: Sequence[int]) -> str:
        if self._tokenizer is None:
            return ""
        return self._tokenizer.decode(list(ids), skip_special_tokens=self._skip_special_tokens)
