"""Keeps the benchmark's own process, which is the engine's caller and frontend, out of the ranks' way.

A caller on another machine takes nothing from the ranks; on this one it would take its share of their cores, and on the
few cores of a small machine that, not the engine, would be measured.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from waybill.engine.ipc.lifeline import Lifeline, watch_lifeline
from waybill.engine.ipc.priority import AUTOGROUP, set_autogroup_nice

# Set in the run in its own session: the lifeline of the process that waits for it.
MARK = "WAYBILL_BENCH_OWN_SESSION"


def run_in_own_session() -> int | None:
    """Run this script again, in a session of its own, and return its exit status; None in that run itself.

    Linux may share cores among sessions (see `engine/ipc/priority.py`), and the caller's terminal is nobody's to slow down.
    """
    if MARK in os.environ:
        watch_lifeline(os.environ[MARK])
        return None
    with tempfile.TemporaryDirectory(prefix="waybill-bench-") as folder:
        lifeline = Lifeline(f"{folder}/lifeline")
        child = subprocess.Popen(
            [sys.executable, *sys.argv], env=os.environ | {MARK: lifeline.path}, start_new_session=True
        )
        try:
            return child.wait()
        finally:
            child.terminate()


def lower_priority(nice: int) -> None:
    """Of this process: of all threads that it has, from which later ones inherit."""
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, int(task.name), nice)
    set_autogroup_nice(AUTOGROUP, nice)
