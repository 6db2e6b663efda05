"""The frontend's line to the leaders: numbers what it sends, in one sequence, and lets every leader know every number."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

from ..ipc.frontend_messages import FrontendMessage, GetInternalStateReq, NumberedMessage, SeqNotice


class MessageSender(Protocol):
    """The sending end of a socket."""

    def send(self, message: FrontendMessage) -> None: ...

    def flush_and_close(self, timeout_s: float) -> None: ...


class LeaderLink:
    """`leaders` are in dp order. Never blocks."""

    def __init__(self, leaders: Sequence[MessageSender]) -> None:
        self._leaders = leaders
        self._numbers = itertools.count(1)

    def send(self, dp_rank: int, make: Callable[[int], NumberedMessage]) -> None:
        """To one leader what `make` makes of its number; to the others the number."""
        message = make(next(self._numbers))
        for rank, leader in enumerate(self._leaders):
            leader.send(message if rank == dp_rank else SeqNotice(message.seq))

    def send_to_all(self, make: Callable[[int], NumberedMessage]) -> None:
        """To every leader, under one number: a control operation takes effect at one step on all."""
        message = make(next(self._numbers))
        for leader in self._leaders:
            leader.send(message)

    def ask(self, dp_rank: int, question: GetInternalStateReq) -> None:
        """A question has no number and wakes nobody else."""
        self._leaders[dp_rank].send(question)

    def close(self, timeout_s: float) -> None:
        for leader in self._leaders:
            leader.flush_and_close(timeout_s)
