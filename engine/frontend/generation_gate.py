"""Whether new requests may go to the engine: not while weights change under them.

While an update drains the engine or has more tensors to bring, requests wait here; when a transfer was torn, or memory is
released, they are refused with the reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from ..control.blocked import Blocked, BlockedKind

POLL_S = 0.01


class UnavailableError(RuntimeError):
    """The engine cannot generate now; the message says why and what ends it."""


class NotDrainedError(UnavailableError):
    """What runs did not end in time, so an operation that waits for that was not done."""


class GenerationGate:
    """Lives on one event loop. `timeout_s` bounds every wait."""

    def __init__(self, timeout_s: float, num_at_engine: Callable[[], int]) -> None:
        self._timeout_s = timeout_s
        self._num_at_engine = num_at_engine
        self._open = asyncio.Event()
        self._open.set()
        self._lock = asyncio.Lock()
        self._is_closed = False
        self._death: Exception | None = None
        # Why the engine holds every request, as it said last.
        self._blocked: Blocked | None = None
        self.is_paused = False

    @property
    def blocked(self) -> Blocked | None:
        return self._blocked

    @blocked.setter
    def blocked(self, blocked: Blocked | None) -> None:
        self._blocked = blocked
        self._settle()

    @property
    def is_open(self) -> bool:
        """Whether nobody waits here."""
        return self._open.is_set()

    @property
    def refusal(self) -> str | None:
        """Why a request is refused at once; None if it may come in, or wait for that."""
        return None if self._blocked is None or self._blocked.kind is BlockedKind.INCOMPLETE else self._blocked.message

    @property
    def obstacle(self) -> str | None:
        """Why a request that comes now would not run at once; None if nothing stands against it."""
        if self._blocked is not None:
            return self._blocked.message
        if self.is_paused:
            return "generation is paused; /continue_generation ends it"
        return "an operation is under way" if self._is_closed else None

    def fail_all(self, death: Exception) -> None:
        """The engine is gone: whoever waits here is told."""
        self._death = death
        self._open.set()

    async def enter(self) -> None:
        """Wait until requests may be sent.

        Raises:
            UnavailableError: they may not, or not in time.
            Exception: the one given to `fail_all`.
        """
        if self.refusal is not None:
            raise UnavailableError(self.refusal)
        try:
            async with asyncio.timeout(self._timeout_s):
                # The next operation may have begun since who waits here was woken.
                while not self.is_open:
                    await self._open.wait()
        except TimeoutError:
            message = "weights: an update has not ended in time" if self._blocked is None else self._blocked.message
            raise UnavailableError(message) from None
        if self._death is not None:
            raise self._death
        if self.refusal is not None:
            raise UnavailableError(self.refusal)

    @asynccontextmanager
    async def closed(self, *, drain: bool) -> AsyncIterator[None]:
        """One operation at a time, with no request on its way in; with `drain` also none at the engine, unless it is
        paused: then those that are there stay as they are.

        Raises:
            NotDrainedError: what runs did not end in time; nothing was done.
            Exception: the one given to `fail_all`.
        """
        async with self._lock:
            self._is_closed = True
            self._settle()
            try:
                if drain:
                    await self._drained()
                yield
            finally:
                self._is_closed = False
                self._settle()

    async def _drained(self) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                while self._num_at_engine() and not self.is_paused:
                    if self._death is not None:
                        raise self._death
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise NotDrainedError(
                f"{self._num_at_engine()} requests still run after {self._timeout_s} s; pause or abort them first"
            ) from None

    def _settle(self) -> None:
        may_enter = not self._is_closed and (self._blocked is None or self.refusal is not None)
        if may_enter or self._death is not None:
            self._open.set()
        else:
            self._open.clear()
