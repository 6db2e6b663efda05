"""Who makes the others wait, for how long, and why. Pure arithmetic on what the leaders tell each other.

Leaders wait for each other twice a step: at the agreement, and in the MoE layers of the forward. Whoever waits least came
last; what the others waited longer than that is laid at its door. Every leader times its own waits, so no clocks are
compared, and brings them to the next agreement with the largest delay that it knows of on its own side.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..ipc.frontend_messages import SyncWait
from .agreement import Cause, ForwardMode, Proposal

NANO = 1e-9
# Their time lies within that of another cause.
INNER_CAUSES = (Cause.RING_FULL, Cause.GARBAGE_COLLECTION)


def freeze_garbage_collector() -> None:
    """What is alive now stays alive: collections need not walk it during steps."""
    gc.collect()
    gc.freeze()


class GarbageClock:
    """Time that Python's collector has taken since it was installed."""

    def __init__(self) -> None:
        self.num_pauses = 0
        self.seconds = 0.0
        self._began = 0.0
        self._taken = 0.0
        self._is_installed = False
        self._is_settled = False

    def install(self) -> None:
        gc.callbacks.append(self._on_collection)
        self._is_installed = True

    def settle(self) -> None:
        """Once, at the first rest after the first steps: what they have left alive (code that was loaded or compiled on
        first use, buffers, caches) stays alive, and later collections need not walk it."""
        if self._is_installed and not self._is_settled:
            self._is_settled = True
            freeze_garbage_collector()

    def take(self) -> float:
        """What has been added since the last call."""
        taken, self._taken = self.seconds - self._taken, self.seconds
        return taken

    def _on_collection(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._began = time.perf_counter()
        else:
            self.num_pauses += 1
            self.seconds += time.perf_counter() - self._began


@dataclass
class TurnLog:
    """What one leader's time went to since the last agreement."""

    _seconds: dict[Cause, float] = field(default_factory=dict)

    def add(self, cause: Cause, seconds: float) -> None:
        self._seconds[cause] = self._seconds.get(cause, 0.0) + seconds

    def take(self) -> tuple[Cause, float]:
        """The largest item, and begin anew. What happens inside of others (a full ring, a collection) is named where it
        is most of the largest."""
        if not self._seconds:
            return Cause.OTHER, 0.0
        cause = max(self._seconds, key=self._seconds.__getitem__)
        for inner in INNER_CAUSES:
            if 2 * self._seconds.get(inner, 0.0) > self._seconds[cause]:
                cause = inner
        seconds = self._seconds[cause]
        self._seconds.clear()
        return cause, seconds


@dataclass
class SyncStalls:
    """One leader's account: seconds that it waited for each other one, by cause."""

    dp_rank: int
    _seconds: dict[tuple[int, Cause], float] = field(default_factory=dict)
    _steps: dict[tuple[int, Cause], int] = field(default_factory=dict)
    _last: Sequence[Proposal] = ()

    def observe(self, proposals: Sequence[Proposal]) -> None:
        """The proposals of an agreement carry the waits of the one before, and its delays stand in the ones before."""
        last, self._last = self._last, proposals
        if len(proposals) < 2 or not last:
            return
        waits = [proposal.agree_wait_ns for proposal in proposals]
        straggler = waits.index(min(waits))
        self._lay_on(straggler, Cause(last[straggler].cause), waits[self.dp_rank] - waits[straggler])
        waits = [proposal.forward_wait_ns for proposal in proposals]
        straggler = waits.index(min(waits))
        cause = Cause.PREFILL if last[straggler].mode >= ForwardMode.PREFILL else Cause.DECODE
        self._lay_on(straggler, cause, waits[self.dp_rank] - waits[straggler])

    def _lay_on(self, straggler: int, cause: Cause, wait_ns: int) -> None:
        if straggler == self.dp_rank or wait_ns <= 0:
            return
        key = (straggler, cause)
        self._seconds[key] = self._seconds.get(key, 0.0) + wait_ns * NANO
        self._steps[key] = self._steps.get(key, 0) + 1

    def waits(self) -> list[SyncWait]:
        return [
            SyncWait(straggler, cause.name.lower(), seconds, self._steps[straggler, cause])
            for (straggler, cause), seconds in sorted(self._seconds.items())
        ]
