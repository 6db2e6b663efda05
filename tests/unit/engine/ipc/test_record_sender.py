"""Records of a leader whose output processor does not read: bounded, waited for, never dropped."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import zmq

from waybill.engine.io_struct import FinishReason, OutputRecord, ReqFinished, StepRecord
from waybill.engine.ipc.record_sender import RecordSender
from waybill.engine.ipc.sockets import Receiver

MAX_QUEUED = 8
# So large that the kernel's buffers hold few.
RID = "r" * 100_000


def record(step: int) -> StepRecord:
    """An idle one: what a flood of aborts makes, with routing on or off."""
    return StepRecord(0, step, -1, 0, "v", after=[ReqFinished(RID, FinishReason("abort"))])


def test_a_leader_waits_for_an_output_processor_that_is_behind_and_loses_nothing(tmp_path: Path) -> None:
    context = zmq.Context()
    address = f"ipc://{tmp_path}/records"
    receiver: Receiver[OutputRecord] = Receiver(context, address, OutputRecord, max_queued=MAX_QUEUED)
    line = RecordSender(context, address, max_queued=MAX_QUEUED, timeout_s=30.0)
    num_records, num_sent = 100, 0

    def send() -> None:
        nonlocal num_sent
        for step in range(num_records):
            line.send(record(step))
            num_sent += 1

    leader = threading.Thread(target=send)
    leader.start()
    leader.join(1.0)
    assert leader.is_alive() and num_sent < num_records // 2, "it waits, with a bounded number under way"
    steps = [receiver.receive()[0].step for _ in range(num_records)]
    leader.join(30.0)
    assert steps == list(range(num_records))
    assert line.num_waits > 0 and line.wait_s > 0.5
    line.close(0.0)
    receiver.close()
    context.term()


def test_the_wait_is_bounded_and_the_error_says_for_whom(tmp_path: Path) -> None:
    context = zmq.Context()
    line = RecordSender(context, f"ipc://{tmp_path}/nobody", max_queued=MAX_QUEUED, timeout_s=0.2)
    for step in range(MAX_QUEUED):
        line.send(record(step))
    with pytest.raises(TimeoutError, match=r"the output processor has taken no record within 0\.2 s"):
        line.send(record(MAX_QUEUED))
    line.close(0.0)
    context.term()
