"""What a process logs, to standard error, and how often: whoever can send it something can cause warnings at will."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

BURST = 10
WINDOW_S = 10.0
MAX_KINDS = 256
KIND_CHARS = 80


class Kind(NamedTuple):
    """Records that say the same of different things: one logger, one text before its arguments, one place of an error."""

    logger: str
    level: int
    text: str
    error: str


class Window:
    """Records of one kind since `began`."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.num_records = 0


class LogRateLimit(logging.Filter):
    """Lets a bounded number of warnings and errors of one kind through in each window of time, and says with the next one
    how many it kept back. What is below a warning passes: that is what an operator has asked to see.

    A filter of a handler, so it may be called on any thread.
    """

    def __init__(self, burst: int = BURST, window_s: float = WINDOW_S, clock: Callable[[], float] = time.monotonic):
        super().__init__()
        self._burst = burst
        self._window_s = window_s
        self._clock = clock
        self._windows: dict[Kind, Window] = {}
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        with self._lock:
            num_kept_back = self._count(kind_of(record))
        if num_kept_back is None:
            return False
        if num_kept_back:
            record.msg = f"{record.getMessage()} ({num_kept_back} more like it were not logged)"
            record.args = None
        return True

    def _count(self, kind: Kind) -> int | None:
        """How many were kept back before this one; None if this one is, too."""
        now = self._clock()
        window = self._windows.get(kind)
        num_kept_back = 0
        if window is None or now - window.began >= self._window_s:
            num_kept_back = 0 if window is None else max(0, window.num_records - self._burst)
            self._forget_old(now)
            window = self._windows[kind] = Window(now)
        window.num_records += 1
        return num_kept_back if window.num_records <= self._burst else None

    def _forget_old(self, now: float) -> None:
        if len(self._windows) >= MAX_KINDS:
            self._windows = {
                kind: window for kind, window in self._windows.items() if now - window.began < self._window_s
            }
        if len(self._windows) >= MAX_KINDS:
            self._windows.clear()


def log_to_stderr(level: str, formatter: logging.Formatter) -> None:
    """Everything that this process logs, at a bounded rate."""
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    handler.addFilter(LogRateLimit())
    logging.basicConfig(level=level.upper(), handlers=[handler])


def kind_of(record: logging.LogRecord) -> Kind:
    error = ""
    if record.exc_info and record.exc_info[1] is not None:
        traceback = record.exc_info[1].__traceback__
        while traceback is not None and traceback.tb_next is not None:
            traceback = traceback.tb_next
        place = "" if traceback is None else f"{traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno}"
        error = f"{type(record.exc_info[1]).__name__} {place}"
    return Kind(record.name, record.levelno, str(record.msg).partition("\n")[0][:KIND_CHARS], error)
