"""The output processor of a prefill's side: the rows of prompts whose prefill is done, until the request ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from ..routing.ledger import RouteSlice
from .transfer_server import Endings
from .wire import Answer, Ended, Fetch, Release, Routes


class OfferedRoutes:
    """`Answers` of a route server: the filing thread offers and drops, the server's thread answers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # In place of rows: why there are none.
        self._offered: dict[str, RouteSlice | str] = {}
        self._endings = Endings()
        self.wake: Callable[[], None] = lambda: None

    def offer(self, key: str, rows: RouteSlice | str) -> None:
        """Rows of all positions of a prompt, or why they are missing."""
        with self._lock:
            self._endings.forget(key)
            self._offered[key] = rows
        self.wake()

    def drop(self, key: str, error: str) -> None:
        """They are not to be had (any more)."""
        with self._lock:
            self._offered.pop(key, None)
            self._endings.add(key, error)
        self.wake()

    def release(self, message: Release) -> None:
        """The ranks are told."""

    def answer(self, fetch: Fetch) -> tuple[Answer, Sequence[memoryview]] | None:
        with self._lock:
            error = self._endings.get(fetch.key)
            found = self._offered.get(fetch.key)
        if error is not None:
            return Ended(fetch.key, fetch.attempt, error), []
        if found is None:
            return None
        if isinstance(found, str):
            return Ended(fetch.key, fetch.attempt, found, is_missing=True), []
        columns = [found.rows] if found.weights is None else [found.rows, found.weights]
        parts = [np.ascontiguousarray(column[fetch.start :]) for column in columns]
        versions = [(name, max(start, fetch.start), end) for name, start, end in found.weight_versions]
        kept = [run for run in versions if run[1] < run[2]]
        frames = [part.data.cast("B") for part in parts if len(part)]
        return Routes(fetch.key, fetch.attempt, fetch.start, kept), frames
