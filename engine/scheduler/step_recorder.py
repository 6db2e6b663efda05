"""What a leader tells its output processor: one `StepRecord` a step, in the order of the steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from ..config import EngineConfig
from ..io_struct import BeforeEvent, ReqFinished, StepRecord
from ..ipc.record_sender import Records
from ..plan import ScheduleBatch
from .leader_setup import DpRankInfo
from .step_committer import Committed


class StepRecorder:
    """Collects the events that a record begins with, and sends it once its step is committed.

    `weight_version` is the one that steps are launched with; it changes only while none is in flight.
    """

    def __init__(self, config: EngineConfig, records: Records, dp: DpRankInfo) -> None:
        self._records = records
        self._dp = dp
        self._has_routes = config.enable_return_routed_experts
        self.weight_version = config.weight_version
        self._num_records = 0
        self._events: list[BeforeEvent] = []
        self._finished: list[ReqFinished] = []
        # Of the steps in flight, oldest first.
        self._launched: deque[list[BeforeEvent]] = deque()

    @property
    def has_events(self) -> bool:
        return bool(self._events or self._finished)

    def note(self, event: BeforeEvent) -> None:
        """The next record begins with it."""
        self._events.append(event)

    def send_soon(self) -> None:
        """What was noted goes with the youngest step in flight, at once where there is none. It is of requests that no
        step in flight has a part of, and of pages that earlier ones have filled."""
        if self._launched:
            self._launched[-1] += self._events
            self._events = []
        elif self._events:
            self.record_idle([])

    def note_finished(self, finished: ReqFinished) -> None:
        """The next record that is sent ends with it: for a request that no step in flight has a part in."""
        self._finished.append(finished)

    def note_all(self, events: Iterable[BeforeEvent]) -> None:
        self._events.extend(events)

    def begin_step(self) -> None:
        """A step is launched: what was noted so far belongs to its record."""
        self._launched.append(self._events)
        self._events = []

    def record_step(self, batch: ScheduleBatch, committed: Committed) -> None:
        """The oldest step in flight is committed."""
        ring_seq = batch.step if self._has_routes else -1
        self._send(self._launched.popleft(), committed, ring_seq, self._dp.first_row(batch.num_rows))

    def record_idle(self, finished: list[ReqFinished]) -> None:
        """A record without a forward; what is in flight must have been committed, or the order would be wrong."""
        assert not self._launched
        events, self._events = self._events, []
        self._send(events, Committed([], [], finished), ring_seq=-1, first_row=0)

    def _send(self, before: list[BeforeEvent], committed: Committed, ring_seq: int, first_row: int) -> None:
        self._records.send(
            StepRecord(
                dp_rank=self._dp.dp_rank,
                step=self._num_records,
                ring_seq=ring_seq,
                first_row=first_row,
                weight_version=self.weight_version,
                before=before,
                segments=committed.segments,
                outputs=committed.outputs,
                after=committed.finished + self._finished,
            )
        )
        self._finished = []
        self._num_records += 1
