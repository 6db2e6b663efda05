"""A leader's line to its output processor: records in order, never dropped, and not more of them than the line holds.

With routing on the ring bounds the steps that wait to be filed; this bounds all records, also those without a forward and
those of an engine without routing. An output processor that has stopped leaves its socket unread; then the line fills, and
the leader waits - bounded, counted and logged - until it reads again or the heartbeat has ended it.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Protocol

import zmq

from ..io_struct import OutputRecord
from .sockets import Endpoint, Sender

logger = logging.getLogger(__name__)

# On either end of the socket; the kernel's buffers hold some more.
MAX_QUEUED_RECORDS = 256
RECORD_TIMEOUT_S = 60.0


class Records(Protocol):
    """Where a leader's records go; `num_waits` and `wait_s` say how often and how long it waited for that."""

    num_waits: int
    wait_s: float

    def send(self, record: OutputRecord) -> None: ...


class RecordSender:
    """`Records` over a socket."""

    def __init__(
        self,
        context: zmq.Context[Any],
        where: Endpoint | str,
        *,
        max_queued: int = MAX_QUEUED_RECORDS,
        timeout_s: float = RECORD_TIMEOUT_S,
    ) -> None:
        self._sender: Sender[OutputRecord] = Sender(context, where, max_queued=max_queued)
        self._timeout_s = timeout_s
        self.num_waits = 0
        self.wait_s = 0.0

    def send(self, record: OutputRecord) -> None:
        """
        Raises:
            TimeoutError: the output processor has taken nothing for so long.
        """
        if not self._sender.send_nowait(record):
            self._wait_and_send(record)

    def _wait_and_send(self, record: OutputRecord) -> None:
        if self.num_waits == 0:
            logger.warning("the output processor is behind by all records that may wait (counted from here on)")
        began = time.monotonic()
        while not self._sender.send_nowait(record):
            left_s = began + self._timeout_s - time.monotonic()
            if left_s <= 0 or not self._sender.wait(left_s):
                raise TimeoutError(f"the output processor has taken no record within {self._timeout_s} s")
        self.num_waits += 1
        self.wait_s += time.monotonic() - began

    def close(self, timeout_s: float) -> None:
        self._sender.flush_and_close(timeout_s)
