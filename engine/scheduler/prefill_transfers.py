"""The leader of a prefill's side: lends the pages of prompts to the other side, chunk by chunk as they are committed, and
keeps a request until that has them all, for a bounded time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..io_struct import FinishReason, FirstToken, Logprobs, TokenOutput
from ..ipc.frontend_messages import TransferNotice
from ..plan import DropPages, SharePages
from .req import Req
from .transfers import Settled, Tell

# Cached positions that go before a chunk is computed: fewer are copied sooner than the further question is answered.
MIN_EARLY = 1024
# Rooms of requests that have ended, as many as the ranks remember: they would answer for a request that had one again with
# the end of the one before, or not, by who is asked first.
MAX_ENDED = 4096


@dataclass
class _Lent:
    """One request: how many of its pages the ranks know, and since when it is kept."""

    req: Req
    num_pages: int = 0
    logprobs: Logprobs = field(default_factory=Logprobs)
    done_at: float | None = None
    released: Settled | None = None


class PrefillTransfers:
    """`weight_version` tells the one that steps which are committed now ran with."""

    def __init__(
        self,
        tell: Tell,
        timeout_s: float,
        weight_version: Callable[[], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tell = tell
        self._weight_version = weight_version
        self._timeout_s = timeout_s
        self._clock = clock
        self._lent: dict[str, _Lent] = {}
        # In the order in which they have ended.
        self._ended: dict[str, None] = {}
        self._num_done = 0
        self._num_failed = 0

    def begin(self, req: Req) -> str:
        source = req.recv.transfer
        if source is None:
            return ""
        if source.key in self._lent:
            return f"bootstrap_room={source.room}: another request has it"
        if source.key in self._ended:
            return f"bootstrap_room={source.room}: an earlier request had it; each needs one of its own"
        req.is_lent = True
        self._lent[source.key] = _Lent(req)
        return ""

    def admitted(self, reqs: Sequence[Req]) -> None:
        """What the prefix cache has was committed by earlier requests: it goes while the rest is computed."""
        for req in reqs:
            if req.num_cached >= MIN_EARLY:
                self._share(self._lent_of(req), req.num_cached)

    def committed(self, req: Req, output: TokenOutput | None) -> bool:
        if not req.is_lent:
            return False
        lent, source = self._lent_of(req), req.recv.transfer
        assert source is not None
        if output is not None and output.logprobs is not None:
            lent.logprobs.extend(output.logprobs)
        first = None
        if req.num_committed == req.num_prompt_tokens:
            logprobs = lent.logprobs if req.options.return_logprob else None
            first = FirstToken(req.output_ids[:], self._weight_version(), logprobs, source.digest)
            lent.done_at = self._clock()
        self._share(lent, req.num_committed, first)
        return True

    def _lent_of(self, req: Req) -> _Lent:
        assert req.recv.transfer is not None
        return self._lent[req.recv.transfer.key]

    def _share(self, lent: _Lent, num_ready: int, first: FirstToken | None = None) -> None:
        req, held = lent.req, lent.req.held.pages
        assert req.recv.transfer is not None
        new_pages = held[lent.num_pages :].tobytes()
        lent.num_pages = len(held)
        self._tell(SharePages(req.recv.transfer.key, new_pages, num_ready, first))

    def left(self, req: Req) -> None:
        if not req.is_lent:
            return
        assert req.recv.transfer is not None and req.finish_reason is not None, "what is lent is not retracted"
        req.is_lent = False
        reason, key = req.finish_reason, req.recv.transfer.key
        self._tell(DropPages(key, reason.message or ""))
        self._ended[key] = None
        if len(self._ended) > MAX_ENDED:
            del self._ended[next(iter(self._ended))]
        is_done = self._lent.pop(key).released is not None and reason.type != "abort"
        self._num_done += is_done
        self._num_failed += not is_done

    def on_notice(self, notice: TransferNotice) -> None:
        lent = self._lent.get(notice.key)
        if lent is None or lent.released is not None:
            return
        req = lent.req
        if notice.error:
            reason = FinishReason("abort", message=f"the decode's side: {notice.error}")
        elif lent.done_at is None:
            reason = FinishReason("abort", message="the decode's side needs no more of it")
        else:
            reason = FinishReason("length", length=len(req.output_ids))
        lent.released = Settled(req, reason=reason)

    def settle(self) -> list[Settled]:
        if not self._lent:
            return []
        settled = [lent.released for lent in self._lent.values() if lent.released is not None]
        oldest = self._clock() - self._timeout_s
        message = f"the decode's side has not taken it within {self._timeout_s:g} s (--disaggregation-timeout)"
        for lent in self._lent.values():
            if lent.released is None and lent.done_at is not None and lent.done_at < oldest:
                lent.released = Settled(lent.req, reason=FinishReason.failed(message))
                settled.append(lent.released)
        return settled

    @property
    def is_waiting(self) -> bool:
        return any(lent.done_at is not None for lent in self._lent.values())

    def state(self) -> dict[str, int | float]:
        return {
            "num_transferring": len(self._lent),
            "num_transfers": self._num_done,
            "num_transfers_failed": self._num_failed,
        }
