"""The output processor of a decode's side: fetches rows and log-probabilities of prompts that another engine computes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from ..io_struct import Logprobs, TransferSource
from ..ipc.frontend_messages import TransferNotice
from ..routing.ledger import RouteSlice
from .prompt_rows import PromptRows
from .transfer_client import TransferClient
from .wire import Answer, Ended, Fetch, FetchRoutes, Routes, Welcome

# What a notice calls it.
ROUTES = "routes"


class RouteJob:
    """What one prompt lacks: `rows` are filled, `num_scores` log-probabilities come in their order."""

    def __init__(
        self,
        source: TransferSource,
        attempt: int,
        rows: PromptRows | None,
        num_scores: int,
        on_end: Callable[[RouteJob, str], None],
    ) -> None:
        self.source = source
        self.attempt = attempt
        self.scores = Logprobs()
        # Why the other side has no rows.
        self.missing = ""
        self._rows = rows
        self._num_scores = num_scores
        self._on_end = on_end
        self._incarnation = ""
        self._lease = 0

    @property
    def rows(self) -> RouteSlice | None:
        """Those that have come."""
        return None if self._rows is None else self._rows.cut(self._rows.start, self._rows.end)

    def begin(self, welcome: Welcome) -> dict[str, Fetch]:
        self._incarnation = welcome.incarnation
        return {welcome.routes: self._fetch()}

    def _fetch(self) -> Fetch:
        rows = (0, 0) if self._rows is None else (self._rows.end, self._rows.limit)
        scores = (len(self.scores.input), self._num_scores)
        return FetchRoutes(self._incarnation, self.source.key, self.attempt, rows, scores, self._lease)

    def prepare(self, address: str, answer: Answer) -> None:
        """Rows go to memory of their own."""

    def take(self, address: str, answer: Answer, frames: Sequence[memoryview]) -> Fetch | None:
        if not isinstance(answer, Routes):
            error = answer.error if isinstance(answer, Ended) else ""
            raise ValueError(error or "something else than was asked for has arrived")
        self._lease = answer.lease
        if answer.missing:
            self.missing, self._rows = answer.missing, None
        if answer.start < answer.end or frames:
            if self._rows is None or answer.start != self._rows.end:
                raise ValueError(f"rows from position {answer.start} on have arrived, which were not asked for")
            self._rows.add_frames(answer.end, answer.weight_versions, frames)
        elif not answer.missing and answer.scores is None:
            raise ValueError("an answer has arrived with nothing in it")
        if answer.scores is not None:
            self._add(answer.scores)
        is_whole = self._rows is None or self._rows.end == self._rows.limit
        return None if is_whole and len(self.scores.input) == self._num_scores else self._fetch()

    def _add(self, scores: Logprobs) -> None:
        num = len(scores.input)
        if not 0 < num <= self._num_scores - len(self.scores.input) or len(scores.input_ranks) != num:
            raise ValueError(f"{num} log-probabilities of the prompt have arrived, of {self._num_scores} in all")
        self.scores.extend(scores)

    def finish(self, error: str) -> None:
        self._on_end(self, error)


class ArrivingRoutes:
    """What is on its way, and what waits to be filed. The filing thread asks and takes; `notify(dp_rank, notice)` is called
    on the client's."""

    def __init__(self, client: TransferClient, notify: Callable[[int, TransferNotice], None]) -> None:
        self._client = client
        self._notify = notify
        self._lock = threading.Lock()
        # By key: who fetches it, and who has.
        self._jobs: dict[str, RouteJob] = {}
        self._arrived: dict[str, RouteJob] = {}
        self.num_failed = 0

    def fetch(
        self, source: TransferSource, dp_rank: int, attempt: int, rows: PromptRows | None, num_scores: int
    ) -> None:
        def on_end(job: RouteJob, error: str) -> None:
            with self._lock:
                if self._jobs.get(source.key) is not job:
                    # Dropped at this moment.
                    return
                del self._jobs[source.key]
                if not error:
                    self._arrived[source.key] = job
            self.num_failed += bool(error or job.missing)
            notice = TransferNotice(source.key, ROUTES, attempt, error or job.missing, is_lost=bool(error))
            self._notify(dp_rank, notice)

        job = RouteJob(source, attempt, rows, num_scores, on_end)
        with self._lock:
            self._jobs[source.key] = job
        self._client.add(job)

    def take(self, key: str) -> RouteJob | None:
        """What has arrived of this prompt, if all of it has."""
        with self._lock:
            return self._arrived.pop(key, None)

    def drop(self, key: str) -> None:
        self._client.drop(key)
        with self._lock:
            self._jobs.pop(key, None)
            self._arrived.pop(key, None)
