"""When a leader tells its output processor of a prompt that another engine computes, or goes on with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from support.replica_harness import Replica

from waybill.engine.config import EngineConfig
from waybill.engine.io_struct import ReqAdmitted, SamplingParams, StepRecord, TransferSource
from waybill.engine.ipc.frontend_messages import TransferNotice
from waybill.engine.plan import DropPages, FetchPages, PageMessage, SharePages

PROMPT = list(range(1, 21))
LONG = SamplingParams(temperature=0.0, max_new_tokens=60, ignore_eos=True)
ONE = SamplingParams(temperature=0.0, max_new_tokens=1)


@dataclass
class Pages:
    """In place of the threads that move them."""

    told: list[PageMessage] = field(default_factory=list)

    def handle(self, message: PageMessage) -> None:
        self.told.append(message)

    def counters(self) -> dict[str, int | float]:
        return {}


def make_replica(side: str, depth: int) -> tuple[Replica, Pages]:
    pages = Pages()
    config = EngineConfig(
        model_path="", page_size=1, chunked_prefill_size=8, overlap_depth=depth, disaggregation=side, tp_size=1
    )
    return Replica(config, 256, page_transfers=pages), pages


def turns_until(replica: Replica, rid: str) -> int:
    """Of the loop, until the output processor knows that it is admitted."""
    for turn in range(1, 20):
        replica.turn()
        if rid in replica.cached:
            return turn
    raise AssertionError("it is not admitted")


def numbers(replica: Replica, has: Callable[[StepRecord], bool]) -> list[int]:
    """Of the records sent so far that have something."""
    records = [record for record in replica.records.sent if isinstance(record, StepRecord)]
    return [number for number, record in enumerate(records) if has(record)]


def is_admission(record: StepRecord) -> bool:
    return any(isinstance(event, ReqAdmitted) and event.rid == "lent" for event in record.before)


def has_segment(record: StepRecord) -> bool:
    return any(segment.rid == "lent" for segment in record.segments)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("others", [False, True])
def test_cached_rows_can_go_before_the_first_chunk_is_computed(
    monkeypatch: pytest.MonkeyPatch, depth: int, others: bool
) -> None:
    monkeypatch.setattr("waybill.engine.scheduler.prefill_transfers.MIN_EARLY", 4)
    replica, pages = make_replica("prefill", depth)
    replica.submit("known", PROMPT, ONE)
    replica.run_until_idle()
    if others:
        replica.submit("other", [40, 41], LONG)
        for _ in range(5):
            replica.turn()
    replica.submit("lent", PROMPT, ONE, transfer=TransferSource("", 1, 7))
    replica.turn()
    admitted, computed = (numbers(replica, is_admission), numbers(replica, has_segment))
    if depth:
        assert admitted and not computed, "with the step before it, or by itself"
    else:
        assert admitted[0] < computed[0]
    assert isinstance(pages.told[0], SharePages) and pages.told[0].num_ready == len(PROMPT) - 1
    for _ in range(3):
        replica.turn()
    replica.send(lambda _: TransferNotice("7.0", "released"))
    replica.run_until_idle()
    assert replica.finished["lent"].reason.type == "length" and isinstance(pages.told[-1], DropPages)
    # Nobody's rows have a gap, whatever came early.
    assert replica.num_rows["lent"] == len(PROMPT)


@pytest.mark.parametrize("depth", [0, 1])
def test_rows_are_asked_for_with_the_step_in_flight(depth: int) -> None:
    replica, pages = make_replica("decode", depth)
    replica.submit("other", [40, 41], LONG)
    for _ in range(5):
        replica.turn()
    replica.submit("awaited", PROMPT, LONG, transfer=TransferSource("h", 1, 7))
    assert turns_until(replica, "awaited") == 1
    assert isinstance(pages.told[0], FetchPages)
