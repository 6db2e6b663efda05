"""Answers that somebody waits for, by the id of the operation."""

from __future__ import annotations

import asyncio
from typing import Any


class PendingReplies:
    """Lives on one event loop. After `fail_all` nobody waits any more: every `expect` raises."""

    def __init__(self) -> None:
        self._waiting: dict[str, asyncio.Future[Any]] = {}
        self._death: Exception | None = None

    def expect(self, op_id: str) -> asyncio.Future[Any]:
        """The answer to come.

        Raises:
            Exception: the one given to `fail_all`.
        """
        if self._death is not None:
            raise self._death
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[op_id] = future
        future.add_done_callback(lambda _: self._waiting.pop(op_id, None))
        return future

    def resolve(self, op_id: str, reply: Any) -> None:
        """An answer has come; one that nobody waits for is dropped."""
        future = self._waiting.get(op_id)
        if future is not None and not future.done():
            future.set_result(reply)

    def fail_all(self, death: Exception) -> None:
        self._death = death
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(death)
