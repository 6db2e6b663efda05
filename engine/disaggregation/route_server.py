"""The output processor of a prefill's side: rows and log-probabilities of prompts as they are filed, kept until the request
ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..io_struct import Logprobs
from ..routing.ledger import RouteSlice
from ..routing.wire import raw_bytes
from .prompt_rows import PromptRows
from .transfer_server import LET_GO, Endings
from .wire import Answer, Ended, Fetch, FetchRoutes, Release, Routes

# Rows of one answer. A message of more is out of the processor's cache before it is encrypted, and nothing of it is on its
# way before all of it is.
ANSWER_BYTES = 1 << 20
# Log-probabilities of one answer.
ANSWER_SCORES = 2048


@dataclass
class _Offered:
    """What is there of a prompt. No other one has the number `lease`. Rows that are `missing` do not come."""

    lease: int
    rows: PromptRows | None
    missing: str = ""
    scores: Logprobs = field(default_factory=Logprobs)

    def answer(self, fetch: FetchRoutes) -> tuple[Answer, Sequence[memoryview]] | None:
        (start, limit), (first, last) = fetch.rows, fetch.scores
        wants_rows = start < limit
        missing = self.missing if wants_rows else ""
        found = None
        if wants_rows and self.rows is not None and start < self.rows.end:
            end = min(limit, self.rows.end, start + max(1, ANSWER_BYTES // self.rows.row_bytes))
            found = self.rows.cut(start, end)
        last = min(last, len(self.scores.input), first + ANSWER_SCORES)
        scores = self.scores.of_prompt(first, last) if first < last else None
        if found is None and scores is None and not missing:
            return None
        if found is None:
            return Routes(fetch.key, fetch.attempt, self.lease, start, start, missing=missing, scores=scores), []
        columns = [found.rows] if found.weights is None else [found.rows, found.weights]
        end, versions = start + len(found.rows), found.weight_versions
        head = Routes(fetch.key, fetch.attempt, self.lease, start, end, versions, scores=scores)
        return head, [raw_bytes(column) for column in columns]


class OfferedRoutes:
    """`Answers` of a route server: the filing thread adds and drops, the server's thread answers. What has been sent does
    not change any more, and so is not copied."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_leases = 0
        self._offered: dict[str, _Offered] = {}
        self._endings = Endings()
        self.wake: Callable[[], None] = lambda: None

    def begin(self, key: str, rows: PromptRows | None) -> None:
        """A prompt, with room for its rows where they are recorded."""
        with self._lock:
            self._endings.forget(key)
            self._num_leases += 1
            self._offered[key] = _Offered(self._num_leases, rows)

    def add_rows(self, key: str, found: RouteSlice) -> None:
        """Those of the next positions."""
        with self._lock:
            rows = self._offered[key].rows
            assert rows is not None, "see `begin`"
            rows.add(found)
        self.wake()

    def miss_rows(self, key: str, error: str) -> None:
        """Why the next positions have none. No rows come after that."""
        with self._lock:
            self._offered[key].missing = error
        self.wake()

    def add_scores(self, key: str, logprobs: Logprobs) -> None:
        """The prompt's next log-probabilities; those of its output are left."""
        with self._lock:
            self._offered[key].scores.extend(logprobs.of_prompt(0, len(logprobs.input)))
        self.wake()

    def drop(self, key: str, error: str) -> None:
        """Nothing is to be had (any more)."""
        with self._lock:
            self._offered.pop(key, None)
            self._endings.add(key, error)
        self.wake()

    def release(self, message: Release) -> None:
        """The ranks are told."""

    def answer(self, fetch: Fetch) -> tuple[Answer, Sequence[memoryview]] | None:
        if not isinstance(fetch, FetchRoutes):
            return Ended(fetch.key, fetch.attempt, "no pages are to be had here"), []
        with self._lock:
            error = self._endings.get(fetch.key)
            offered = self._offered.get(fetch.key)
            if error is None and fetch.lease and (offered is None or offered.lease != fetch.lease):
                error = LET_GO
            if error is not None:
                return Ended(fetch.key, fetch.attempt, error), []
            return None if offered is None else offered.answer(fetch)
