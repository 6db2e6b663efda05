"""Requests that find no room for their images wait in line, for the end of those whose images have it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ..vision.image_store import ImageMemoryFullError, ImageStore
from .admission import OverloadedError

T = TypeVar("T")


class RoomLine:
    """First come, first served. Who waits has pinned nothing, so that nobody waits for each other. Lives on one event loop;
    admission bounds how many wait, `timeout_s` for how long."""

    def __init__(self, store: ImageStore, timeout_s: float) -> None:
        self._store = store
        self._timeout_s = timeout_s
        # Whoever has it is the first one.
        self._turn = asyncio.Lock()
        self.num_waiting = 0

    async def run(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """What `attempt` gives, which pins all images of a request, or none where it raises. While others wait, their
        turns come before.

        Raises:
            OverloadedError: there was no room in time.
            And what else `attempt` raises.
        """
        # Of all of it: what the first attempt has taken is no more to be waited for.
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        if not self.num_waiting:
            try:
                return await attempt()
            except ImageMemoryFullError:
                pass
        self.num_waiting += 1
        try:
            async with asyncio.timeout_at(deadline) as bound, self._turn:
                return await self._persist(attempt)
        except TimeoutError:
            if not bound.expired():
                raise
            raise OverloadedError(
                f"there was no room for the request's images within {self._timeout_s:g} s (--encoder-timeout): those of "
                "others take what there is (--image-memory-bytes)"
            ) from None
        finally:
            self.num_waiting -= 1

    async def _persist(self, attempt: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                return await attempt()
            except ImageMemoryFullError as error:
                # Not asked for in vain: to be refused again it would be encoded, and sent, again.
                while not self._store.has_room(error.num_bytes):
                    self._store.room_made.clear()
                    await self._store.room_made.wait()
