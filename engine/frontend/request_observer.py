"""Who wants to know how requests fare: metrics and logs see every one of them through this seam."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..io_struct import RequestOutput
from .answer import Answer


class RequestObserver(Protocol):
    """Called on the event loop; must not wait."""

    def on_output(self, answer: Answer, output: RequestOutput) -> None:
        """An output has arrived and is part of the answer."""
        ...

    def on_end(self, answer: Answer, outcome: str) -> None:
        """No more will come. `outcome`: stop, length, abort, failed (by the engine, alone), cancelled (its caller left)
        or error (the engine is gone)."""
        ...

    def on_refusal(self, outcome: str) -> None:
        """A request did not fit the engine. `outcome`: refused or overloaded."""
        ...


class NoObserver:
    """For programs that hold the engine themselves."""

    def on_output(self, answer: Answer, output: RequestOutput) -> None:
        pass

    def on_end(self, answer: Answer, outcome: str) -> None:
        pass

    def on_refusal(self, outcome: str) -> None:
        pass


class ObserverGroup:
    """Several as one."""

    def __init__(self, observers: Sequence[RequestObserver]) -> None:
        self._observers = observers

    def on_output(self, answer: Answer, output: RequestOutput) -> None:
        for observer in self._observers:
            observer.on_output(answer, output)

    def on_end(self, answer: Answer, outcome: str) -> None:
        for observer in self._observers:
            observer.on_end(answer, outcome)

    def on_refusal(self, outcome: str) -> None:
        for observer in self._observers:
            observer.on_refusal(outcome)
