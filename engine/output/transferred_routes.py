"""Rows of prompts that one engine computes and another goes on with: offered when they are all filed or, on the other side,
fetched as a request is admitted and filed when the leader says that its pages have arrived."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..disaggregation.route_client import ArrivingRoutes
from ..disaggregation.route_server import OfferedRoutes
from ..disaggregation.routes_side import RoutesSide
from ..io_struct import ReqFinished, ReqStarted, ReqTransferred, Segment, TransferSource
from ..routing.ledger import MissingRoutesError, RouteLedger


@dataclass
class _Transfer:
    """Of one request. As the leader, it counts its attempts."""

    source: TransferSource
    num_prompt_tokens: int
    attempt: int = 0
    is_done: bool = False


class TransferredRoutes:
    """On the filing thread. Without a `side` nothing is transferred."""

    def __init__(self, side: RoutesSide | None) -> None:
        self._offered = side if isinstance(side, OfferedRoutes) else None
        self._arriving = side if isinstance(side, ArrivingRoutes) else None
        self._transfers: dict[str, _Transfer] = {}

    def offers(self, started: ReqStarted, ledger: RouteLedger) -> bool:
        """Whether the combine weights of a request are for the other side."""
        return self._offered is not None and started.transfer is not None and ledger.geometry.has_weights

    def admitted(self, started: ReqStarted, dp_rank: int, ledger: RouteLedger) -> None:
        if started.transfer is None or (self._offered is None and self._arriving is None):
            return
        transfer = self._transfers.setdefault(started.rid, _Transfer(started.transfer, started.num_prompt_tokens))
        transfer.attempt += 1
        if self._arriving is not None and not transfer.is_done:
            start = ledger.num_on_pages(started.rid)
            num_rows = transfer.num_prompt_tokens - start
            self._arriving.fetch(transfer.source, dp_rank, transfer.attempt, start, num_rows, ledger.geometry)

    def retracted(self, rid: str) -> None:
        transfer = self._transfers.get(rid)
        if transfer is not None and self._arriving is not None and not transfer.is_done:
            self._arriving.drop(transfer.source.key)

    def arrived(self, event: ReqTransferred, ledger: RouteLedger) -> int:
        """How many rows were filed. Those that did not come are missing."""
        transfer = self._transfers[event.rid]
        assert self._arriving is not None
        transfer.is_done = True
        num_tokens = transfer.num_prompt_tokens - ledger.num_on_pages(event.rid)
        return ledger.adopt(event.rid, event.new_pages, num_tokens, self._arriving.take(transfer.source.key))

    def filed(self, segments: Sequence[Segment], ledger: RouteLedger) -> None:
        """Offer what is whole now."""
        if self._offered is None:
            return
        for segment in segments:
            transfer = self._transfers.get(segment.rid)
            end = segment.start + segment.num_tokens
            if transfer is not None and not segment.discarded and end == transfer.num_prompt_tokens:
                try:
                    self._offered.offer(transfer.source.key, ledger.get_topk(segment.rid, 0, end + 1))
                except MissingRoutesError as error:
                    self._offered.offer(transfer.source.key, str(error))

    def finished(self, finished: ReqFinished) -> None:
        transfer = self._transfers.pop(finished.rid, None)
        if transfer is None:
            return
        if self._offered is not None:
            self._offered.drop(transfer.source.key, finished.reason.message or "the prefill's side has let go of it")
        elif self._arriving is not None:
            self._arriving.drop(transfer.source.key)
