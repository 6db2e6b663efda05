"""A bound on what the host waits for the device: kernels that wait for other ranks have none of their own."""

from __future__ import annotations

import time
from types import TracebackType

from ..ipc.critical_thread import end_process, start_critical_thread

BOUND_S = 120.0
CHECKS_A_BOUND = 8


class DeviceWatchdog:
    """Ends the process where a `with` block of it takes longer than the bound; the other ranks follow, as from any
    death."""

    def __init__(self, bound_s: float = BOUND_S) -> None:
        self._bound_s = bound_s
        self._since: float | None = None
        start_critical_thread(self._watch, "device watchdog")

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._since = None

    def _watch(self) -> None:
        while True:
            time.sleep(self._bound_s / CHECKS_A_BOUND)
            since = self._since
            if since is not None and time.monotonic() - since > self._bound_s:
                end_process(
                    f"a step is not done after {self._bound_s:.0f} s: the device, or a rank that it waits for, is stuck"
                )
