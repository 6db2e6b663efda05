"""Who made the others wait, and why."""

from __future__ import annotations

import gc

from hypothesis import given
from hypothesis import strategies as st

from waybill.engine.ipc.frontend_messages import SyncWait
from waybill.engine.scheduler.agreement import Cause, ForwardMode, Proposal
from waybill.engine.scheduler.sync_stalls import GarbageClock, SyncStalls, TurnLog

SECOND = 10**9
OUTER = (Cause.RECEIVE, Cause.PREFILL, Cause.DECODE, Cause.RETRACTION, Cause.CONTROL)


def test_the_largest_item_is_the_cause_and_the_log_begins_anew() -> None:
    log = TurnLog()
    assert log.take() == (Cause.OTHER, 0.0)
    log.add(Cause.RECEIVE, 1.0)
    log.add(Cause.PREFILL, 0.75)
    log.add(Cause.PREFILL, 0.75)
    assert log.take() == (Cause.PREFILL, 1.5)
    assert log.take() == (Cause.OTHER, 0.0)


def test_what_happens_inside_is_named_where_it_is_most_of_the_largest() -> None:
    for inner in (Cause.RING_FULL, Cause.GARBAGE_COLLECTION):
        log = TurnLog()
        log.add(Cause.DECODE, 1.0)
        log.add(inner, 0.5)
        assert log.take() == (Cause.DECODE, 1.0), "half of it is not most of it"
        log.add(Cause.DECODE, 1.0)
        log.add(inner, 0.75)
        assert log.take() == (inner, 0.75)


@given(st.lists(st.tuples(st.sampled_from(OUTER), st.integers(0, 8)), max_size=12))
def test_no_item_is_larger_than_the_one_that_is_named(items: list[tuple[Cause, int]]) -> None:
    log, totals = TurnLog(), dict.fromkeys(OUTER, 0)
    for cause, seconds in items:
        log.add(cause, float(seconds))
        totals[cause] += seconds
    cause, seconds = log.take()
    assert seconds == max(totals.values())
    assert cause == Cause.OTHER or totals[cause] == seconds


def proposals(*waits: tuple[int, int], **fields: tuple[int, int]) -> list[Proposal]:
    """One for each (wait at the agreement, wait in the forward), in seconds."""
    return [
        Proposal(
            agree_wait_ns=agree * SECOND,
            forward_wait_ns=forward * SECOND,
            **{name: values[rank] for name, values in fields.items()},
        )
        for rank, (agree, forward) in enumerate(waits)
    ]


def test_whoever_waits_least_came_last_and_its_own_words_give_the_cause() -> None:
    """Waits at one agreement are told at the next; what the late one did stands in its proposal of the first."""
    stalls = [SyncStalls(0), SyncStalls(1)]
    first = proposals((0, 0), (0, 0), cause=(Cause.RECEIVE, Cause.RETRACTION), mode=(2, 1))
    second = proposals((5, 1), (2, 4), cause=(Cause.DECODE, Cause.DECODE), mode=(1, 1))
    for account in stalls:
        account.observe(first)
        account.observe(second)
    assert stalls[0].waits() == [SyncWait(1, "retraction", 3.0, 1)]
    assert stalls[1].waits() == [SyncWait(0, "prefill", 3.0, 1)]
    assert first[0].mode == ForwardMode.PREFILL


def test_waits_add_up_by_rank_and_cause() -> None:
    account = SyncStalls(2)
    for _ in range(3):
        account.observe(proposals((0, 0), (2, 0), (3, 0), cause=(Cause.PREFILL, Cause.OTHER, Cause.OTHER)))
    assert account.waits() == [SyncWait(0, "prefill", 6.0, 2)]


def test_nobody_blames_itself_nor_without_others() -> None:
    alone, last = SyncStalls(0), SyncStalls(1)
    for _ in range(2):
        alone.observe(proposals((4, 4)))
        last.observe(proposals((4, 4), (1, 1)))
    assert alone.waits() == []
    assert last.waits() == []


def test_collections_are_timed_and_taken_once() -> None:
    clock = GarbageClock()
    clock.install()
    try:
        gc.collect()
    finally:
        gc.callbacks.remove(clock._on_collection)
    assert clock.num_pauses == 1
    assert clock.take() == clock.seconds > 0.0
    assert clock.take() == 0.0


def test_what_the_first_steps_left_is_frozen_once() -> None:
    clock = GarbageClock()
    before = gc.get_freeze_count()
    clock.settle()
    # Fewer where another thread drops what is frozen; more by a freeze alone.
    assert gc.get_freeze_count() <= before, "nothing is frozen where the collector is not watched"
    clock.install()
    try:
        kept = [[number] for number in range(1000)]
        clock.settle()
        frozen = gc.get_freeze_count()
        assert frozen >= before + len(kept)
        more = [[number] for number in range(1000)]
        clock.settle()
        assert gc.get_freeze_count() <= frozen, len(more)
    finally:
        gc.unfreeze()
        gc.callbacks.remove(clock._on_collection)
