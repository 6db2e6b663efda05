"""One event a second for everybody who looks. The engine is asked once a second however many look, and not at all while
nobody does. A viewer that reads slowly misses events; nothing piles up for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from ...frontend.admission import OverloadedError
from ...frontend.engine_connection import EngineDeadError
from ...frontend.tokenizer_manager import TokenizerManager
from ...ipc.output_queries import ExpertLoadReply
from .live_event import LiveEvent, engine_now
from .recent_requests import RecentRequests

MAX_VIEWERS = 16
PERIOD_S = 1.0
ANSWER_TIMEOUT_S = 3.0


class LiveFeed:
    """`join`, read `events`, and `leave` in any case. Lives on the event loop."""

    def __init__(
        self, manager: TokenizerManager, recent: RecentRequests, model_name: str, *, period_s: float = PERIOD_S
    ) -> None:
        self._manager = manager
        self._recent = recent
        self._model_name = model_name
        self._period_s = period_s
        self._num_viewers = 0
        self._ticking: asyncio.Task[None] | None = None
        # The newest event, and what wakes those who wait for the next one.
        self._event: msgspec.Raw | None = None
        self._next: asyncio.Future[None] | None = None
        self._before: tuple[float, dict[str, Any]] | None = None
        self._is_closed = False

    @property
    def is_active(self) -> bool:
        """Whether anybody looks."""
        return self._ticking is not None

    def join(self) -> None:
        """Take a viewer's place.

        Raises:
            OverloadedError: there is none, or the server ends.
        """
        if self._is_closed:
            raise OverloadedError("the server is stopping")
        if self._num_viewers >= MAX_VIEWERS:
            raise OverloadedError(f"{MAX_VIEWERS} pages are open already; close one")
        self._num_viewers += 1
        if self._ticking is None:
            self._next = asyncio.get_running_loop().create_future()
            self._ticking = asyncio.create_task(self._tick(), name="live feed")
            self._ticking.add_done_callback(self._wake)

    def leave(self) -> None:
        self._num_viewers -= 1
        if not self._num_viewers and self._ticking is not None:
            self._ticking.cancel()
            self._ticking = self._event = self._before = None

    def close(self) -> None:
        """The server ends: streams come to their end now."""
        self._is_closed = True
        if self._ticking is not None:
            self._ticking.cancel()

    async def events(self) -> AsyncIterator[msgspec.Raw]:
        """The newest event, if there is one, and every later one that the reader is in time for, until `close`."""
        ticking = self._ticking
        if ticking is None:
            return
        if self._event is not None:
            yield self._event
        while not self._is_closed:
            assert self._next is not None
            await asyncio.shield(self._next)
            if ticking.done():
                if not ticking.cancelled():
                    # It never returns: this raises what has ended it.
                    ticking.result()
                return
            assert self._event is not None
            yield self._event

    def _wake(self, ticking: asyncio.Task[None] | None = None) -> None:
        waiting = self._next
        if ticking is not None and ticking is not self._ticking and self._ticking is not None:
            # An earlier one, whose viewers had left before these came.
            return
        self._next = asyncio.get_running_loop().create_future()
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    async def _tick(self) -> None:
        while True:
            began = time.monotonic()
            self._event = msgspec.Raw(msgspec.json.encode(await self._make_event()))
            self._wake()
            await asyncio.sleep(max(self._period_s - (time.monotonic() - began), self._period_s / 2))

    async def _make_event(self) -> LiveEvent:
        config = self._manager.config
        reason, engine = self._manager.not_ready(), None
        if reason is None:
            try:
                state, loads = await asyncio.wait_for(self._ask_engine(), ANSWER_TIMEOUT_S)
            except (EngineDeadError, TimeoutError) as error:
                self._before = None
                reason = str(error) or f"the engine did not answer within {ANSWER_TIMEOUT_S} s"
            else:
                now = time.monotonic()
                before_at, before = self._before or (now, None)
                engine = engine_now(state, before, now - before_at, loads)
                self._before = now, state
        return LiveEvent(
            time=time.time(),
            model=self._model_name,
            tp_size=config.tp_size,
            dp_size=config.dp_size,
            viewers=self._num_viewers,
            reason=reason or "",
            engine=engine,
            requests=self._recent(),
        )

    async def _ask_engine(self) -> tuple[dict[str, Any], list[ExpertLoadReply]]:
        """A leader that is idle does not check its pages for this: requests that come would wait."""
        state, loads = await asyncio.gather(
            self._manager.get_state(check_pages=False), self._manager.queries.get_expert_loads()
        )
        return state, loads
