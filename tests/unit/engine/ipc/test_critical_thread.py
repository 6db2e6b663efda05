"""What all of a process depends on is not lost in silence."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from waybill.engine.ipc.critical_thread import EXIT_PART_FAILED, start_critical_thread

PROCESS = """
import threading
from waybill.engine.ipc.critical_thread import start_critical_thread
def fail():
    {how}
start_critical_thread(fail, "baker")
threading.Event().wait(60)
"""


@pytest.mark.parametrize("how", ["raise KeyError('flour')", "raise SystemExit", "[].pop()"])
def test_a_thread_that_fails_ends_its_process_and_says_why(how: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROCESS.format(how=how)], capture_output=True, text=True, timeout=50)
    assert done.returncode == EXIT_PART_FAILED
    assert "the baker thread has failed" in done.stderr and "Traceback" in done.stderr


def test_a_thread_whose_work_is_done_ends_nothing_and_an_owner_may_take_the_failure() -> None:
    failures: list[str] = []
    start_critical_thread(lambda: None, "done", failures.append).join()
    assert failures == []
    start_critical_thread(lambda: 1 / 0, "baker", failures.append).join()
    assert failures == ["the baker thread has failed: ZeroDivisionError('division by zero')"]
    assert threading.main_thread().is_alive()
