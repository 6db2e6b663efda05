"""Death is planned for: a child ends when its parent is gone.

The parent makes a FIFO and holds its write end; a child's watcher thread waits for the read end to hang up and leaves
with `os._exit`. A signal handler would not do: Python runs handlers on the main thread, which may sit in a collective.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from typing import NoReturn

from .critical_thread import start_critical_thread

EXIT_ORPHANED = 3


class Lifeline:
    """The parent's end. Children watch `path`; `cut` (or the parent's death) ends them."""

    def __init__(self, path: str) -> None:
        self.path = path
        os.mkfifo(path, 0o600)
        # Read and write: opening does not wait for a child, and a child that opens later finds a writer.
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def cut(self) -> None:
        """End every child that still watches."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def watch_lifeline(path: str, on_death: Callable[[], None] | None = None) -> None:
    """Start the child's watcher: when no writer is left, call `on_death` and exit at once."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        # The parent has gone and cleaned up before we looked.
        os._exit(EXIT_ORPHANED)
    # A FIFO that has had no writer since it was opened reads as ended but does not poll as hung up.
    try:
        orphaned = os.read(fd, 1) == b""
    except BlockingIOError:
        orphaned = False
    if orphaned:
        _end(on_death)

    def wait() -> None:
        poller = select.poll()
        poller.register(fd, select.POLLHUP)
        poller.poll()
        _end(on_death)

    start_critical_thread(wait, "lifeline")


def _end(on_death: Callable[[], None] | None) -> NoReturn:
    if on_death is not None:
        on_death()
    os._exit(EXIT_ORPHANED)
