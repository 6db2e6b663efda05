"""What a leader says of its own time: each wait is told once, at the agreement after it."""

from __future__ import annotations

from dataclasses import dataclass, field

from waybill.engine.io_struct import OutputRecord
from waybill.engine.scheduler.agreement import Cause, ForwardMode
from waybill.engine.scheduler.step_clock import StepClock
from waybill.parallel.moe.dispatch import SyncClock


@dataclass
class FakeRecords:
    """A line to the output processor that the test lets wait."""

    num_waits: int = 0
    wait_s: float = 0.0
    sent: list[OutputRecord] = field(default_factory=list)

    def send(self, record: OutputRecord) -> None:
        self.sent.append(record)


def test_waits_for_the_output_processor_are_told_once() -> None:
    records = FakeRecords()
    clock = StepClock(SyncClock(), None, records)
    clock.add(Cause.CONTROL, 5.0)
    records.wait_s = 4.0
    assert clock.take() == (Cause.RING_FULL, 4_000_000_000, 0), "it is most of what the turn took"
    clock.add(Cause.CONTROL, 5.0)
    assert clock.take() == (Cause.CONTROL, 5_000_000_000, 0)
    assert clock.state()["record_wait_s"] == 4.0


def test_what_the_layers_wait_for_others_is_not_the_leaders_own() -> None:
    forward = SyncClock()
    clock = StepClock(forward, None, FakeRecords())
    forward.seconds = 7.0
    clock.begin_launch()
    forward.seconds = 10.0
    clock.end_launch(ForwardMode.DECODE)
    clock.add(Cause.RECEIVE, 0.5)
    # The launch itself took no time here, so that its own part is below zero.
    assert clock.take() == (Cause.RECEIVE, 500_000_000, 3_000_000_000)
    assert clock.take()[2] == 0, "no forward, no wait in it"
