"""What a leader's own time goes to between two agreements, so that the others can be told why it came late."""

from __future__ import annotations

import time

from ...parallel.moe.dispatch import SyncClock
from ..ipc.record_sender import Records
from ..routing.ring import RouteRing
from .agreement import Cause, ForwardMode
from .sync_stalls import GarbageClock, TurnLog

NANO = 1e9


class StepClock:
    """Times one leader's turns. `forward` counts what its layers wait for other ranks."""

    def __init__(self, forward: SyncClock, ring: RouteRing | None, records: Records) -> None:
        self.garbage = GarbageClock()
        self._turns = TurnLog()
        self._forward = forward
        self._ring = ring
        self._records = records
        # Waits for the output processor that were told already.
        self._told_full_s = 0.0
        self._forward_wait_s = 0.0
        self._launch_began = 0.0
        self._waited_before_launch_s = 0.0

    def add(self, cause: Cause, seconds: float) -> None:
        self._turns.add(cause, seconds)

    def begin_launch(self) -> float:
        """Returns the time of it."""
        self._waited_before_launch_s = self._forward.seconds
        self._launch_began = time.perf_counter()
        return self._launch_began

    def end_launch(self, mode: ForwardMode) -> None:
        """What the layers waited for others is not this leader's own."""
        self._forward_wait_s = self._forward.seconds - self._waited_before_launch_s
        own = time.perf_counter() - self._launch_began - self._forward_wait_s
        self._turns.add(Cause.PREFILL if mode >= ForwardMode.PREFILL else Cause.DECODE, own)

    def take(self) -> tuple[Cause, int, int]:
        """Since the last call: this leader's largest delay, its nanoseconds, and those its layers waited for others."""
        full_s = self._records.wait_s + (0.0 if self._ring is None else self._ring.wait_s)
        self._turns.add(Cause.RING_FULL, full_s - self._told_full_s)
        self._told_full_s = full_s
        self._turns.add(Cause.GARBAGE_COLLECTION, self.garbage.take())
        cause, seconds = self._turns.take()
        forward_wait_s, self._forward_wait_s = self._forward_wait_s, 0.0
        return cause, int(seconds * NANO), int(forward_wait_s * NANO)

    def state(self) -> dict[str, int | float | str]:
        """Pauses of the collector, and waits for the output processor."""
        return {
            "garbage_pauses": self.garbage.num_pauses,
            "garbage_pause_s": self.garbage.seconds,
            "routing_ring_occupied": 0 if self._ring is None else self._ring.num_occupied,
            "routing_ring_waits": 0 if self._ring is None else self._ring.num_waits,
            "routing_ring_wait_s": 0.0 if self._ring is None else self._ring.wait_s,
            "record_waits": self._records.num_waits,
            "record_wait_s": self._records.wait_s,
        }
