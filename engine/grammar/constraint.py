"""One request's place in its grammar, on its leader."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

# int32 words of one bit a token, the lowest bit first.
Mask = NDArray[np.int32]


class Constraint:
    """What a request's next token may be. `MaskMaker` alone moves it.

    `begins_after` is the token behind which the grammar begins - the end of a model's reasoning; until it has come anything
    goes. `num_tokens` were consumed, also of those before the grammar, so `mask` is about the token at that position: None
    while anything goes. A grammar that cannot go on has a `failure`, and a mask without tokens.
    """

    def __init__(self, compiled: Future[LLMatcher], begins_after: int | None = None) -> None:
        self.compiled = compiled
        self._matcher: LLMatcher | None = None
        self.begins_after = begins_after
        self.has_begun = begins_after is None
        self.num_tokens = 0
        self.mask: Mask | None = None
        self.failure = ""
        # Nothing but the end of the text is allowed.
        self.has_ended = False
        # What was asked of the maker of masks, and is not done.
        self.pending: Future[None] | None = None

    @property
    def matcher(self) -> LLMatcher:
        assert self._matcher is not None, "moved before it was compiled"
        return self._matcher

    @matcher.setter
    def matcher(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def is_ready(self) -> bool:
        """Whether the request may run: nothing of its first mask is to be waited for."""
        return self.pending is not None and self.pending.done()
