"""The leader of a decode's side: requests wait here until their prompt's pages and rows have arrived from the prefill's
side, and what that has come to."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..io_struct import FinishReason, FirstToken
from ..ipc.frontend_messages import TransferNotice
from ..plan import DropPages, FetchPages
from .req import Req
from .transfers import Settled, Tell

FIRST_PART = "pages0"
ROUTES = "routes"


@dataclass
class _Awaited:
    """One request. `missing`: the parts that have not arrived yet, see `TransferNotice`."""

    req: Req
    since: float
    attempt: int = 0
    is_fetching: bool = False
    missing: set[str] = field(default_factory=set)
    first: FirstToken | None = None
    error: str = ""


def difference(awaited: _Awaited) -> str:
    """Pages of another prompt must not be cached as those of this one, however many there are."""
    source = awaited.req.recv.transfer
    assert source is not None
    if awaited.first is None or awaited.first.digest == source.digest:
        return ""
    images = "images (and the weights of their --encoder), " if awaited.req.recv.images else ""
    fields = f"prompt, {images}return_logprob, logprob_start_len and top_logprobs_num"
    return f"bootstrap_room={source.room} is another request there: {fields} must be the same on both sides"


class DecodeTransfers:
    """`has_routes`: rows are waited for, too, by the part's name `ROUTES`, as are a prompt's log-probabilities."""

    def __init__(
        self,
        tell: Tell,
        timeout_s: float,
        tp_size: int,
        *,
        has_routes: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tell = tell
        self._timeout_s = timeout_s
        self._parts = {f"pages{rank}" for rank in range(tp_size)}
        self._has_routes = has_routes
        self._clock = clock
        self._awaited: dict[str, _Awaited] = {}
        self._num_done = 0
        self._num_failed = 0

    def begin(self, req: Req) -> str:
        source = req.recv.transfer
        if source is None:
            return ""
        if source.key in self._awaited:
            return f"bootstrap_room={source.room}: another request has it"
        req.is_awaited = True
        self._awaited[source.key] = _Awaited(req, self._clock())
        return ""

    def admitted(self, reqs: Sequence[Req]) -> bool:
        """Rows are asked for when the output processor hears of it."""
        for req in reqs:
            source = req.recv.transfer
            assert source is not None
            awaited = self._awaited[source.key]
            awaited.attempt += 1
            has_more = self._has_routes or req.options.num_scored(req.num_prompt_tokens) > 0
            awaited.is_fetching, awaited.missing = True, self._parts | ({ROUTES} if has_more else set())
            pages = req.held.pages.tobytes()
            self._tell(FetchPages(source, awaited.attempt, req.num_cached, req.num_prompt_tokens, pages))
        return True

    def committed(self, req: Req, output: object) -> bool:
        return False

    def left(self, req: Req) -> None:
        if not req.is_awaited:
            return
        assert req.recv.transfer is not None
        key = req.recv.transfer.key
        awaited = self._awaited[key]
        if req.finish_reason is None:
            # Retracted: it will be fetched again.
            awaited.is_fetching = False
            self._tell(DropPages(key, again=True))
            return
        del self._awaited[key]
        req.is_awaited = False
        self._num_failed += 1
        self._tell(DropPages(key, req.finish_reason.message or "the request has ended"))

    def on_notice(self, notice: TransferNotice) -> None:
        awaited = self._awaited.get(notice.key)
        if awaited is None or not awaited.is_fetching or notice.attempt != awaited.attempt:
            return
        awaited.missing.discard(notice.part)
        if notice.part == FIRST_PART:
            awaited.first = notice.first
        if notice.error and (notice.part != ROUTES or notice.is_lost):
            awaited.error = notice.error
        # Where the prefill's side has no rows, the request goes on without them, as it would there. Rows that were lost on
        # their way would be missing for everybody who hits these pages later: it fails, and may be sent again. So it does
        # where log-probabilities were.

    def settle(self) -> list[Settled]:
        """Requests to go on with have left this when they are returned; those to fail leave as they finish."""
        settled: list[Settled] = []
        oldest = self._clock() - self._timeout_s
        for key, awaited in list(self._awaited.items()):
            # Of a difference the error of a transfer is but a symptom.
            error = difference(awaited) or awaited.error
            if error:
                settled.append(Settled(awaited.req, reason=FinishReason.failed(f"prefill: {error}")))
            elif awaited.is_fetching and not awaited.missing and awaited.first is not None:
                del self._awaited[key]
                awaited.req.is_awaited = False
                self._num_done += 1
                self._tell(DropPages(key))
                settled.append(Settled(awaited.req, awaited.first))
            elif awaited.since < oldest:
                message = f"its prompt has not arrived within {self._timeout_s:g} s (--disaggregation-timeout)"
                settled.append(Settled(awaited.req, reason=FinishReason.failed(f"prefill: {message}")))
        return settled

    @property
    def is_waiting(self) -> bool:
        return bool(self._awaited)

    def state(self) -> dict[str, int | float]:
        return {
            "num_transferring": len(self._awaited),
            "num_transfers": self._num_done,
            "num_transfers_failed": self._num_failed,
        }
