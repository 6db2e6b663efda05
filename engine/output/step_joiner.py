"""Joins the step records of all dp ranks with the routing that one of them records. Pure: no sockets, no memory shared.

The records of a dp rank arrive in order; those of different ranks in any. A record whose rows stand in a ring slot waits
until the recording rank's own record says that the slot is there; everything after it on the same rank waits with it. A
slot is done when every dp rank's record of it was applied.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from ..io_struct import StepRecord


class StepJoiner:
    """`dp_ranks` are those whose records come here; `recorder` is the one whose records publish ring slots."""

    def __init__(self, dp_ranks: tuple[int, ...], recorder: int) -> None:
        self._recorder = recorder
        self._waiting: dict[int, deque[StepRecord]] = {dp_rank: deque() for dp_rank in dp_ranks}
        # The next ring slot of each rank that was not applied yet.
        self._next_seq = dict.fromkeys(dp_ranks, 0)
        self._num_published = 0
        self._num_done = 0
        # Ranks that have not applied slot `num_done + i` yet: counted down, so that no record costs a pass over all ranks.
        self._num_ranks_left: deque[int] = deque()

    @property
    def num_waiting(self) -> int:
        """Records that cannot be applied yet."""
        return sum(map(len, self._waiting.values()))

    def add(self, record: StepRecord) -> Iterator[StepRecord]:
        """Take a record in; yields those that are due, in an order that is right for each rank. A record counts as applied
        when the next one is asked for."""
        self._waiting[record.dp_rank].append(record)
        if record.dp_rank == self._recorder and record.ring_seq >= 0:
            assert record.ring_seq == self._num_published, "slots are published in order"
            self._num_published += 1
            ranks = list(self._waiting)
        else:
            ranks = [record.dp_rank]
        for dp_rank in ranks:
            queue = self._waiting[dp_rank]
            while queue and queue[0].ring_seq < self._num_published:
                due = queue.popleft()
                yield due
                if due.ring_seq >= 0:
                    assert due.ring_seq == self._next_seq[dp_rank], "a rank has a record for every forward"
                    self._next_seq[dp_rank] += 1
                    self._count(due.ring_seq)

    def _count(self, seq: int) -> None:
        """One more rank has applied this slot."""
        index = seq - self._num_done
        if index == len(self._num_ranks_left):
            self._num_ranks_left.append(len(self._waiting))
        self._num_ranks_left[index] -= 1

    def take_done(self) -> range:
        """Ring slots that have become done since the last call."""
        first = self._num_done
        while self._num_ranks_left and self._num_ranks_left[0] == 0:
            self._num_ranks_left.popleft()
            self._num_done += 1
        return range(first, self._num_done)
