"""Giving way to the ranks."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

logger = logging.getLogger(__name__)

AUTOGROUP = Path("/proc/self/autogroup")
# The kernel takes one change of any autogroup in a tenth of a second.
ATTEMPTS, RETRY_S = 20, 0.1


def give_way(nice: int) -> None:
    """Run this process at low priority, in a session of its own.

    Where Linux groups tasks by session (autogroup), `nice` orders the tasks of one session only: a process in the session
    of rank 0 shares cores with rank 1 as an equal, whatever its nice value. So it leaves the session, and the
    new session's group gets the nice value, too.
    """
    if os.getpid() != os.getpgrp():
        os.setsid()
    os.nice(nice)
    if AUTOGROUP.is_file():
        set_autogroup_nice(AUTOGROUP, nice)


def set_autogroup_nice(file: Path, nice: int) -> None:
    for _ in range(ATTEMPTS):
        try:
            file.write_text(str(nice))
        except BlockingIOError:
            time.sleep(RETRY_S)
        except OSError as error:
            logger.info("the session keeps its priority: %s", error)
            return
        else:
            return
