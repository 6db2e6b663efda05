"""What a leader tells its output processor, and in which order."""

from __future__ import annotations

from waybill.engine.config import EngineConfig
from waybill.engine.io_struct import ReqAdmitted, StepRecord
from waybill.engine.plan import ScheduleBatch
from waybill.engine.scheduler.leader_setup import DpRankInfo
from waybill.engine.scheduler.step_committer import Committed
from waybill.engine.scheduler.step_recorder import StepRecorder


class Records:
    def __init__(self) -> None:
        self.sent: list[StepRecord] = []

    def send(self, record: StepRecord) -> None:
        self.sent.append(record)


def test_what_is_sent_soon_goes_with_the_step_in_flight_or_by_itself() -> None:
    records = Records()
    recorder = StepRecorder(EngineConfig(model_path=""), records, DpRankInfo())  # type: ignore[arg-type]
    first, second, third, fourth = (ReqAdmitted(rid, b"") for rid in "abcd")
    recorder.note(first)
    recorder.begin_step()
    recorder.note(second)
    recorder.note(third)
    recorder.send_soon()
    assert records.sent == [] and not recorder.has_events
    recorder.record_step(ScheduleBatch(0, [], 0, False, []), Committed([], [], []))
    recorder.note(fourth)
    recorder.send_soon()
    recorder.send_soon()
    assert [record.before for record in records.sent] == [[first, second, third], [fourth]]
    assert [record.ring_seq for record in records.sent] == [-1, -1] and not recorder.has_events
