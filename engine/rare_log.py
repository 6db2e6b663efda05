"""Warnings that whoever sits at the other end of a socket can cause as often as he likes: one in a while, with a count."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

INTERVAL_S = 10.0


class RareLog:
    """Passes one warning an interval on; the next says how many there were in between. For one thread."""

    def __init__(
        self, logger: logging.Logger, interval_s: float = INTERVAL_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._logger = logger
        self._interval_s = interval_s
        self._clock = clock
        self._last: float | None = None
        self._num_left_out = 0

    def warning(self, message: str, *arguments: object) -> None:
        now = self._clock()
        if self._last is not None and now - self._last < self._interval_s:
            self._num_left_out += 1
            return
        more = f" (and {self._num_left_out} such before)" if self._num_left_out else ""
        self._logger.warning(message + more, *arguments)
        self._last, self._num_left_out = now, 0
