"""Threads without which a process is of no use: one that fails ends the process, so that who watches over it sees that.

A daemon thread that dies of an exception is noticed by nobody, and whoever waits for its work waits for ever. So every
long-lived thread is started here, and its failure has an owner.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

# The exit status of a process that lost a thread or a task which it cannot do without.
EXIT_PART_FAILED = 5


def end_process(reason: str) -> None:
    """Leave at once, from whatever thread: a part that all of the process depends on has failed."""
    logger.critical("%s: ending this process", reason)
    logging.shutdown()
    os._exit(EXIT_PART_FAILED)


def start_critical_thread(
    target: Callable[[], object], name: str, on_failure: Callable[[str], None] = end_process
) -> threading.Thread:
    """Run `target` on a daemon thread. It returns when its work is over, in order; any exception is logged and passed on
    in words to `on_failure`, which by default ends the process with `EXIT_PART_FAILED`."""

    def run() -> None:
        try:
            target()
        except BaseException as error:
            # Whatever it is, SystemExit too: nobody else would hear of it.
            logger.critical("the %s thread has failed", name, exc_info=error)
            on_failure(f"the {name} thread has failed: {error!r}")

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread
