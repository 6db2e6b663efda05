"""Whether new requests may go to the engine: not while weights change under them.

While an update drains the engine or has more tensors to bring, requests wait here; when a transfer was torn, or memory is
released, they are refused with the reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

POLL_S = 0.01


class UnavailableError(RuntimeError):
    """The engine cannot generate now; the message says why and what ends it."""


class GenerationGate:
    """Lives on one event loop. `timeout_s` bounds every wait."""

    def __init__(self, timeout_s: float, num_at_engine: Callable[[], int]) -> None:
        self._timeout_s = timeout_s
        self._num_at_engine = num_at_engine
        self._open = asyncio.Event()
        self._open.set()
        self._lock = asyncio.Lock()
        # Why the engine holds every request, as it said last.
        self.hold: str | None = None
        self.is_paused = False

    @property
    def refusal(self) -> str | None:
        """Why a request is refused at once; None if it may come in, or wait for that."""
        waits_for_more = self.hold is None or self.hold.startswith("weights: an update is not complete")
        return None if waits_for_more else self.hold

    async def enter(self) -> None:
        """Wait until requests may be sent.

        Raises:
            UnavailableError: they may not, or not in time.
        """
        if self.refusal is not None:
            raise UnavailableError(self.refusal)
        try:
            await asyncio.wait_for(self._open.wait(), self._timeout_s)
        except TimeoutError:
            raise UnavailableError(self.hold or "weights: an update has not ended in time") from None
        if self.refusal is not None:
            raise UnavailableError(self.refusal)

    @asynccontextmanager
    async def closed(self, *, drain: bool) -> AsyncIterator[None]:
        """One operation at a time, with no request on its way in; with `drain` also none at the engine, unless it is
        paused: then those that are there stay as they are.

        Raises:
            TimeoutError: what runs did not end in time.
        """
        async with self._lock:
            self._open.clear()
            try:
                if drain and not self.is_paused:
                    async with asyncio.timeout(self._timeout_s):
                        while self._num_at_engine():
                            await asyncio.sleep(POLL_S)
                yield
            finally:
                self._reopen()

    def _reopen(self) -> None:
        if self.hold is None or self.refusal is not None:
            self._open.set()
