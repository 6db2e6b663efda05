"""Rows and log-probabilities of prompts that one engine computes and another goes on with: offered as they are filed or, on
the other side, fetched as a request is admitted and filed when the leader says that its pages have arrived."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from ..disaggregation.prompt_rows import PromptRows
from ..disaggregation.route_client import ArrivingRoutes
from ..disaggregation.route_server import ANSWER_BYTES, OfferedRoutes
from ..disaggregation.routes_side import RoutesSide
from ..disaggregation.transfer_server import LET_GO
from ..io_struct import Logprobs, ReqFinished, ReqStarted, ReqTransferred, StepRecord, TokenOutput, TransferSource
from ..routing.ledger import MissingRoutesError, RouteLedger


@dataclass
class _Transfer:
    """Of one request. As the leader, it counts its attempts. `has_rows`: none were missing so far."""

    source: TransferSource
    num_prompt_tokens: int
    num_scores: int
    attempt: int = 0
    is_done: bool = False
    has_rows: bool = True


class TransferredRoutes:
    """On the filing thread. Without a `side` nothing is transferred; without a ledger no rows are."""

    def __init__(self, side: RoutesSide | None) -> None:
        self._offered = side if isinstance(side, OfferedRoutes) else None
        self._arriving = side if isinstance(side, ArrivingRoutes) else None
        self._transfers: dict[str, _Transfer] = {}

    def offers(self, started: ReqStarted, ledger: RouteLedger) -> bool:
        """Whether the combine weights of a request are for the other side."""
        return self._offered is not None and started.transfer is not None and ledger.geometry.has_weights

    def admitted(self, started: ReqStarted, dp_rank: int, ledger: RouteLedger | None) -> None:
        if started.transfer is None or (self._offered is None and self._arriving is None):
            return
        transfer = self._transfers.get(started.rid)
        if transfer is None:
            num_prompt_tokens = started.num_prompt_tokens
            num_scores = started.options.num_scored(num_prompt_tokens)
            transfer = _Transfer(started.transfer, num_prompt_tokens, num_scores)
            self._transfers[started.rid] = transfer
        transfer.attempt += 1
        if self._offered is not None:
            self._begin(self._offered, started.rid, transfer, ledger)
        elif self._arriving is not None and not transfer.is_done:
            start = 0 if ledger is None else ledger.num_on_pages(started.rid)
            rows = None if ledger is None else PromptRows(ledger.geometry, start, transfer.num_prompt_tokens)
            if rows is not None or transfer.num_scores:
                self._arriving.fetch(transfer.source, dp_rank, transfer.attempt, rows, transfer.num_scores)

    def _begin(self, offered: OfferedRoutes, rid: str, transfer: _Transfer, ledger: RouteLedger | None) -> None:
        """Rows of cached positions are there already."""
        rows = None if ledger is None else PromptRows(ledger.geometry, 0, transfer.num_prompt_tokens)
        offered.begin(transfer.source.key, rows)
        if ledger is not None:
            self._offer(offered, rid, transfer, ledger, 0, ledger.num_on_pages(rid))

    @staticmethod
    def _offer(
        offered: OfferedRoutes, rid: str, transfer: _Transfer, ledger: RouteLedger, start: int, end: int
    ) -> None:
        """Rows `[start, end)`, an answer's worth at a time: the first leaves while the next is copied."""
        geometry, key = ledger.geometry, transfer.source.key
        step = max(1, ANSWER_BYTES // (geometry.row_bytes + geometry.weights_row_bytes))
        try:
            for first in range(start, end, step):
                offered.add_rows(key, ledger.get_topk(rid, first, min(first + step, end) + 1))
        except MissingRoutesError as error:
            transfer.has_rows = False
            offered.miss_rows(key, str(error))

    def retracted(self, rid: str) -> None:
        transfer = self._transfers.get(rid)
        if transfer is not None and self._arriving is not None and not transfer.is_done:
            self._arriving.drop(transfer.source.key)

    def arrived(self, event: ReqTransferred, ledger: RouteLedger | None) -> tuple[int, TokenOutput]:
        """How many rows were filed - those that did not come are missing -, and the prefill's output with the prompt's
        log-probabilities."""
        transfer = self._transfers[event.rid]
        assert self._arriving is not None and event.output is not None
        transfer.is_done = True
        found = self._arriving.take(transfer.source.key)
        num_filed = 0
        if ledger is not None:
            num_tokens = transfer.num_prompt_tokens - ledger.num_on_pages(event.rid)
            num_filed = ledger.adopt(event.rid, event.new_pages, num_tokens, None if found is None else found.rows)
        if not transfer.num_scores:
            return num_filed, event.output
        assert found is not None, "the leader has waited for it"
        logprobs = event.output.logprobs or Logprobs()
        both = Logprobs(logprobs.output, logprobs.output_top)
        both.extend(found.scores)
        return num_filed, msgspec.structs.replace(event.output, logprobs=both)

    def filed(self, record: StepRecord, ledger: RouteLedger | None) -> None:
        """Offer what is new now."""
        if self._offered is None or not self._transfers:
            return
        for segment in record.segments:
            transfer = self._transfers.get(segment.rid)
            if transfer is not None and transfer.has_rows and ledger is not None and not segment.discarded:
                end = segment.start + segment.num_tokens
                self._offer(self._offered, segment.rid, transfer, ledger, segment.start, end)
        for output in record.outputs:
            transfer = self._transfers.get(output.rid)
            if transfer is not None and output.logprobs is not None and output.logprobs.input:
                self._offered.add_scores(transfer.source.key, output.logprobs)

    def finished(self, finished: ReqFinished) -> None:
        transfer = self._transfers.pop(finished.rid, None)
        if transfer is None:
            return
        if self._offered is not None:
            self._offered.drop(transfer.source.key, finished.reason.message or LET_GO)
        elif self._arriving is not None:
            self._arriving.drop(transfer.source.key)
