"""Slots are done when every rank has applied its record of them: the joiner's countdown against counting all ranks anew."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from waybill.engine.io_struct import StepRecord
from waybill.engine.step_joiner import StepJoiner

NUM_SLOTS = 5


@given(st.integers(1, 4), st.data())
def test_slots_are_done_when_the_slowest_rank_has_applied_them(num_ranks: int, data: st.DataObject) -> None:
    joiner = StepJoiner(tuple(range(num_ranks)), recorder=0)
    # Every rank's records in order, now and then one without a forward; ranks in any order.
    left = {
        rank: [-1, *range(NUM_SLOTS)] if data.draw(st.booleans()) else [*range(NUM_SLOTS)] for rank in range(num_ranks)
    }
    applied = dict.fromkeys(left, 0)
    done: list[int] = []
    while any(left.values()):
        rank = data.draw(st.sampled_from([rank for rank, seqs in left.items() if seqs]))
        for record in joiner.add(StepRecord(rank, 0, left[rank].pop(0), 0, "v")):
            if record.ring_seq >= 0:
                assert record.ring_seq == applied[record.dp_rank]
                applied[record.dp_rank] += 1
        done += joiner.take_done()
        assert done == list(range(min(applied.values())))
    assert done == list(range(NUM_SLOTS)) and joiner.num_waiting == 0
