"""The ledger as it was: segment by segment, and every slice copied twice. For figures side by side in one run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from waybill.engine.io_struct import Segment
from waybill.engine.routing.ledger import RouteLedger, RouteSlice


@contextmanager
def ledger_as_before(active: bool) -> Iterator[None]:
    """While it lasts, if `active`, ledgers file and slice the slow way; what they hold is the same."""
    file_step, get_topk = RouteLedger.file_step, RouteLedger.get_topk

    def file_by_segment(
        self: RouteLedger, segments: Sequence[Segment], rows: np.ndarray, version: str, weights: None = None
    ) -> int:
        assert weights is None, "the simulation records ids alone"
        for segment in segments:
            self.allocate(segment)
        first = num_filed = 0
        for segment in segments:
            if not segment.discarded:
                self.file(segment, rows[:, first : first + segment.num_tokens], version)
                num_filed += segment.num_tokens
            first += segment.num_tokens
        return num_filed

    def get_and_copy(self: RouteLedger, rid: str, start_len: int, seqlen: int) -> RouteSlice:
        found = get_topk(self, rid, start_len, seqlen)
        return RouteSlice(found.start, np.concatenate([found.rows]), found.weight_versions)

    if active:
        RouteLedger.file_step, RouteLedger.get_topk = file_by_segment, get_and_copy  # type: ignore[method-assign]
    try:
        yield
    finally:
        RouteLedger.file_step, RouteLedger.get_topk = file_step, get_topk  # type: ignore[method-assign]
