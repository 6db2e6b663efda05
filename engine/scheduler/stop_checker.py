"""Decides when a request is finished: stop strings (`stop_strings`, the parameter `stop`), stop token ids, end of sequence
and length are checked here. The leader alone asks; nobody else ends a request.

`stop_search.py` finds a stop string in the text.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from ..io_struct import FinishReason
from ..text.token_decoder import TokenDecoder
from .req import Req
from .stop_search import StopMatch, StopSearch


class StopChecker:
    """Finish rules of one model: its end-of-sequence ids and its tokenizer (None: no stop strings)."""

    def __init__(self, eos_token_ids: tuple[int, ...], decoder: TokenDecoder | None) -> None:
        self._eos_token_ids = frozenset(eos_token_ids)
        self._decoder = decoder
        # One for each request that has stop strings; it lasts as long, through retractions, which keep the output.
        self._searches: WeakKeyDictionary[Req, StopSearch] = WeakKeyDictionary()

    def stop_ids(self, req: Req) -> frozenset[int]:
        """Tokens that end this request when sampled."""
        ids = frozenset(req.params.stop_token_ids)
        return ids if req.params.ignore_eos else ids | self._eos_token_ids

    def check(self, req: Req) -> FinishReason | None:
        """Whether the request's last committed token ends it, and why; a stop wins over the length limit.

        Asked once for every committed token, in order.
        """
        params = req.params
        num_output = len(req.output_ids)
        if num_output == 0:
            return FinishReason("length", length=0) if params.max_new_tokens == 0 else None
        # Before `min_new_tokens` a match ends nothing, also later: only what ends within the last token counts.
        match = self._search(req)
        if num_output >= params.min_new_tokens:
            last = req.output_ids[-1]
            if last in self.stop_ids(req):
                return FinishReason("stop", matched=last)
            if match is not None:
                return FinishReason("stop", matched=match.stop, text_length=match.text_length)
        if num_output >= params.max_new_tokens:
            return FinishReason("length", length=num_output)
        return None

    def _search(self, req: Req) -> StopMatch | None:
        """The stop string that the last token completes."""
        params = req.params
        if not params.stop:
            return None
        search = self._searches.get(req)
        if search is None:
            assert self._decoder is not None, "stop strings are refused at the edge where there is no tokenizer"
            search = StopSearch(self._decoder, params.stop, skip_special_tokens=req.options.skip_special_tokens)
            self._searches[req] = search
        return search.push(req.output_ids[-1])
