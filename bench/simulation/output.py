"""The real output processor, called instead of run: every record is received, decoded, applied and shipped on this thread,
and each of these is timed by the CPU time of the thread."""

from __future__ import annotations

import time
from collections import deque
from cProfile import Profile
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq

from waybill.engine.io_struct import OutputBatch, OutputRecord, StepRecord
from waybill.engine.ipc.sockets import Receiver, Sender
from waybill.engine.output.output_processor import OutputProcessor
from waybill.engine.output.output_sender import OutputSender, ShipmentOrder
from waybill.engine.routing.claims import ClaimStore
from waybill.engine.text.token_decoder import TokenDecoder

from .leaders import FRONTEND, RECORDS
from .tape import Tape
from .workload import Conversations


class CalledOutputSender(OutputSender):
    """An output sender without its thread: orders wait until they are asked for."""

    def __init__(self, sender: Sender[OutputBatch], decoder: TokenDecoder | None, claims: ClaimStore) -> None:
        super().__init__(sender, decoder, claims)
        self.orders: deque[ShipmentOrder] = deque()

    def submit(self, order: ShipmentOrder) -> None:
        self.orders.append(order)


@dataclass(frozen=True)
class RecordCost:
    """CPU seconds that one record cost: receive and decode; join, file and slice; text, envelope and send."""

    receive_s: float
    file_s: float
    ship_s: float


class OutputSide:
    """Output processor and frontend of one engine. With a `profile` the output processor's part is recorded in it."""

    def __init__(self, context: zmq.Context[Any], dp_size: int, decoder: TokenDecoder | None) -> None:
        self._records: Receiver[OutputRecord] = Receiver(context, RECORDS, OutputRecord)
        self._answers: Receiver[OutputBatch] = Receiver(context, FRONTEND, OutputBatch)
        sender: Sender[OutputBatch] = Sender(context, FRONTEND)
        self.output_sender = CalledOutputSender(sender, decoder, ClaimStore(1 << 20, 60.0, time.monotonic))
        self.processor = OutputProcessor(self.output_sender, dp_size)
        self.profile: Profile | None = None
        self.tape: Tape | None = None

    def work_off(self) -> list[RecordCost]:
        """Everything that the leaders have sent."""
        costs = []
        while self._records.wait(0):
            if self.profile is not None:
                self.profile.enable()
            cost = self._handle_next()
            if self.profile is not None:
                self.profile.disable()
            if cost is not None:
                costs.append(cost)
        return costs

    def _handle_next(self) -> RecordCost | None:
        began = time.thread_time()
        record, _ = self._records.receive()
        received = time.thread_time()
        self.processor.handle(record)
        filed = time.thread_time()
        while self.output_sender.orders:
            self.output_sender.ship(self.output_sender.orders.popleft())
        shipped = time.thread_time()
        if not isinstance(record, StepRecord):
            return None
        if self.tape is not None:
            self.tape.last.records.append(msgspec.msgpack.encode(record))
        return RecordCost(received - began, filed - received, shipped - filed)

    def deliver(self, conversations: Conversations) -> int:
        """Hand on what was shipped; returns the number of requests that finished."""
        num_finished = 0
        while self._answers.wait(0):
            batch, frames = self._answers.receive()
            left = iter(frames)
            for output in batch.outputs:
                conversations.take(output, None if output.routed_experts is None else next(left))
                num_finished += output.finish_reason is not None
            assert next(left, None) is None, "a frame without an output"
        return num_finished
