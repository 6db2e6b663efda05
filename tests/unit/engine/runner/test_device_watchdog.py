"""A process whose device does not answer ends, with a reason."""

from __future__ import annotations

import subprocess
import sys

from waybill.engine.ipc.critical_thread import EXIT_PART_FAILED

SCRIPT = """
import time
from waybill.engine.runner.device_watchdog import DeviceWatchdog
watchdog = DeviceWatchdog(bound_s=0.4)
for _ in range(10):
    with watchdog:
        time.sleep(0.1)
print("went on", flush=True)
with watchdog:
    time.sleep(60)
"""


def test_only_what_takes_longer_than_the_bound_ends_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=50)
    assert done.returncode == EXIT_PART_FAILED and done.stdout == "went on\n"
    assert "a step is not done after 0 s" in done.stderr
