"""The last requests that ended, for the page."""

from __future__ import annotations

import time
from collections import deque

import msgspec

from ...frontend.answer import Answer
from ...io_struct import RequestOutput

NUM_RECENT = 20
# A caller may choose a longer one.
SHOWN_RID_CHARS = 64


class EndedRequest(msgspec.Struct, frozen=True):
    """`outcome` as for a `RequestObserver`; `seconds` from its arrival to its end, `ended` since 1970."""

    rid: str
    outcome: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    seconds: float
    ended: float
    has_routes_error: bool


class RecentRequests:
    """A `RequestObserver` that remembers `NUM_RECENT`, the newest first."""

    def __init__(self) -> None:
        self._ended: deque[EndedRequest] = deque(maxlen=NUM_RECENT)

    def __call__(self) -> list[EndedRequest]:
        return list(self._ended)

    def on_output(self, answer: Answer, output: RequestOutput) -> None:
        pass

    def on_end(self, answer: Answer, outcome: str) -> None:
        self._ended.appendleft(
            EndedRequest(
                answer.rid[:SHOWN_RID_CHARS],
                outcome,
                answer.prompt_tokens,
                answer.cached_tokens,
                answer.completion_tokens,
                time.perf_counter() - answer.began,
                time.time(),
                answer.routed_experts_error is not None,
            )
        )

    def on_refusal(self, outcome: str) -> None:
        pass
