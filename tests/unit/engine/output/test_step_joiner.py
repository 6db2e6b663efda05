"""Records of all dp ranks, interleaved in any way: each rank's order is kept, no row is read before its slot is published,
and every slot is given back once, in order, when all ranks are done with it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from waybill.engine.io_struct import StepRecord
from waybill.engine.output.step_joiner import StepJoiner


def record(dp_rank: int, step: int, ring_seq: int) -> StepRecord:
    return StepRecord(dp_rank, step, ring_seq, 0, "v")


@dataclass
class Run:
    """`idle[rank][i]` records without a forward stand before the rank's forward i, and behind the last one."""

    num_forwards: int
    idle: list[list[int]]
    order: list[int]
    recorder: int = 0
    left: list[list[StepRecord]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for dp_rank, gaps in enumerate(self.idle):
            seqs = [seq for forward, gap in enumerate(gaps) for seq in [-1] * gap + [forward]][:-1]
            self.left.append([record(dp_rank, step, seq) for step, seq in enumerate(seqs)])


@st.composite
def runs(draw: st.DrawFn) -> Run:
    num_ranks, num_forwards = draw(st.integers(1, 4)), draw(st.integers(0, 6))
    gaps = st.lists(st.integers(0, 2), min_size=num_forwards + 1, max_size=num_forwards + 1)
    idle = [draw(gaps) for _ in range(num_ranks)]
    num_records = sum(sum(each) + num_forwards for each in idle)
    order = draw(st.lists(st.integers(0, num_ranks - 1), min_size=num_records, max_size=num_records))
    return Run(num_forwards, idle, order, recorder=draw(st.integers(0, num_ranks - 1)))


@settings(max_examples=300)
@given(runs())
def test_any_interleaving(run: Run) -> None:
    num_ranks = len(run.left)
    joiner = StepJoiner(tuple(range(num_ranks)), run.recorder)
    applied: list[list[StepRecord]] = [[] for _ in range(num_ranks)]
    sent = [list(records) for records in run.left]
    num_published, given_back = 0, []
    for choice in run.order:
        # The rank that was drawn, or the next one that has something left.
        dp_rank = next(
            (rank % num_ranks for rank in range(choice, choice + num_ranks) if run.left[rank % num_ranks]), None
        )
        if dp_rank is None:
            break
        new = run.left[dp_rank].pop(0)
        num_published += new.dp_rank == run.recorder and new.ring_seq >= 0
        for due in joiner.add(new):
            assert due.ring_seq < num_published, "read before it was published"
            applied[due.dp_rank].append(due)
        done = list(joiner.take_done())
        assert all(seq in [step.ring_seq for step in applied[rank]] for seq in done for rank in range(num_ranks)), (
            "given back while a rank still has rows in it"
        )
        given_back += done
        assert joiner.num_waiting == sum(
            len(whole) - len(left) - len(there) for whole, left, there in zip(sent, run.left, applied, strict=True)
        )
        for rank in range(num_ranks):
            # Nothing waits that could be applied.
            arrived = sent[rank][: len(sent[rank]) - len(run.left[rank])]
            due_by_now = next(
                (index for index, step in enumerate(arrived) if step.ring_seq >= num_published), len(arrived)
            )
            assert applied[rank] == arrived[:due_by_now]
    assert applied == sent
    assert joiner.num_waiting == 0
    assert given_back == list(range(run.num_forwards))


def test_a_rank_that_leaves_out_a_forward_is_found() -> None:
    joiner = StepJoiner((0, 1), recorder=0)
    assert len(list(joiner.add(record(0, 0, 0)))) == 1
    assert len(list(joiner.add(record(0, 1, 1)))) == 1
    with pytest.raises(AssertionError, match="a record for every forward"):
        list(joiner.add(record(1, 0, 1)))


def test_a_slot_that_is_published_out_of_order_is_found() -> None:
    with pytest.raises(AssertionError, match="published in order"):
        list(StepJoiner((0,), recorder=0).add(record(0, 0, 1)))
