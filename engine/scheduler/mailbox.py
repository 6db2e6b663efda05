"""A leader's incoming messages, in the order of their numbers, and which of them are due.

Requests are taken as they come. A control operation waits until the agreement says that every leader has it, and holds back
what came after it, so that all ranks apply it at the same step and in the same order. Questions have no number and are
answered at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Protocol

from ..ipc.frontend_messages import (
    AbortReq,
    ControlReq,
    FrontendMessage,
    GetInternalStateReq,
    NumberedMessage,
    ShutdownReq,
    TransferNotice,
    UnnumberedMessage,
)
from .agreement import Agreement

# What is sent to all leaders and takes effect at one step.
ALIGNED = (AbortReq, ControlReq, ShutdownReq)


class Inbox(Protocol):
    """The receiving end of a socket."""

    def wait(self, timeout_s: float) -> bool: ...

    def receive_nowait(self) -> FrontendMessage | None: ...


class Mailbox:
    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._questions: deque[UnnumberedMessage] = deque()
        self._backlog: deque[NumberedMessage] = deque()
        # The highest number received, and the highest one handled.
        self.seen = 0
        self.applied = 0

    def wait(self, timeout_s: float) -> None:
        """Sleep until something arrives, at most `timeout_s`."""
        self._inbox.wait(timeout_s)

    def collect(self) -> None:
        """Take in what has arrived; never blocks."""
        while (message := self._inbox.receive_nowait()) is not None:
            if isinstance(message, (GetInternalStateReq, TransferNotice)):
                self._questions.append(message)
            else:
                assert message.seq > self.seen, "the frontend's numbers rise"
                self.seen = message.seq
                self._backlog.append(message)

    def due(self, agreement: Agreement) -> Iterator[FrontendMessage]:
        """What is to be handled now; a message counts as applied when the next one is asked for."""
        while self._questions:
            yield self._questions.popleft()
        while self._backlog:
            message = self._backlog[0]
            if isinstance(message, ALIGNED) and not agreement.allows(
                message.seq, asks_for_idle=isinstance(message, ControlReq) and message.operation.asks_for_idle
            ):
                return
            self._backlog.popleft()
            yield message
            self.applied = message.seq
