"""Decides when a request is finished. The leader alone asks; nobody else ends a request.

Stop strings are searched in the text of a bounded tail of the output, so that a check costs the same at any length.
"""

from __future__ import annotations

from typing import Protocol

from .io_struct import FinishReason
from .schedule_batch import Req

# A character takes at most four bytes and a token yields at least one, but for special ones, which yield none.
MAX_TOKENS_PER_CHARACTER = 4
SPECIAL_TOKEN_MARGIN = 8


class Decoder(Protocol):
    """The part of a tokenizer that the check needs."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...


class StopChecker:
    """Finish rules of one model: its end-of-sequence ids and its tokenizer (None: no stop strings)."""

    def __init__(self, eos_token_ids: tuple[int, ...], decoder: Decoder | None) -> None:
        self._eos_token_ids = frozenset(eos_token_ids)
        self._decoder = decoder

    def stop_ids(self, req: Req) -> frozenset[int]:
        """Tokens that end this request when sampled."""
        ids = frozenset(req.params.stop_token_ids)
        return ids if req.params.ignore_eos else ids | self._eos_token_ids

    def check(self, req: Req) -> FinishReason | None:
        """Whether the request's last committed token ends it, and why; a stop wins over the length limit."""
        params = req.params
        num_output = len(req.output_ids)
        if num_output == 0:
            return FinishReason("length", length=0) if params.max_new_tokens == 0 else None
        if num_output >= params.min_new_tokens:
            last = req.output_ids[-1]
            if last in self.stop_ids(req):
                return FinishReason("stop", matched=last)
            matched = self._match_stop_string(req)
            if matched is not None:
                return FinishReason("stop", matched=matched)
        if num_output >= params.max_new_tokens:
            return FinishReason("length", length=num_output)
        return None

    def _match_stop_string(self, req: Req) -> str | None:
        """The stop string that appears first in the tail's text."""
        stops = req.params.stop
        if not stops:
            return None
        assert self._decoder is not None, "stop strings are refused at the edge where there is no tokenizer"
        num_tail = max(map(len, stops)) * MAX_TOKENS_PER_CHARACTER + SPECIAL_TOKEN_MARGIN
        text = self._decoder.decode(req.output_ids[-num_tail:], skip_special_tokens=req.params.skip_special_tokens)
        found = [(text.index(stop), stop) for stop in stops if stop in text]
        return min(found)[1] if found else None
