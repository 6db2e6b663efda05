"""Virtual time: given what every step cost, when would a running engine have launched, filed and shipped it? Pure.

The engine runs one step after the other: a step lasts as long as the forward or the slowest leader's host work, which
overlap, whichever is longer. The output processor takes records in order of arrival. A step can only be launched when the
ring slot it goes to was filed: an output processor that is too slow holds up the engine in the end, and by how much is
reported.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from .output import RecordCost


@dataclass(frozen=True)
class StepCost:
    """What one step cost: seconds of every leader, one entry a record of the output side, and how much it moved."""

    host_s: np.ndarray
    records: list[RecordCost]
    num_rows: int
    num_bytes_shipped: int
    num_finished: int
    # What the frontend spent on sending the next requests, and their numbers to all leaders.
    link_s: float = 0.0

    @property
    def output_s(self) -> float:
        """CPU time of the output processor, all threads of it."""
        return sum(record.receive_s + record.file_s + record.ship_s for record in self.records)

    @property
    def filing_s(self) -> float:
        return sum(record.receive_s + record.file_s for record in self.records)


@dataclass(frozen=True)
class Lag:
    """How far the output processor is behind when steps end, in medians and at most; and the share of time that the engine
    waits for a ring slot. `utilisation` is the output processor's time over that of an engine that never waits."""

    forward_s: float
    step_s: float
    utilisation: float
    records_waiting: float
    slots_occupied: float
    behind_s: float
    max_behind_s: float
    max_slots_occupied: int
    ring_wait_share: float


def replay(steps: list[StepCost], forward_s: float, num_slots: int, *, one_lock: bool = True) -> Lag:
    """`one_lock`: all threads of the output processor take turns, as Python's do unless they release the interpreter;
    else shipping costs filing nothing."""
    # Entry i + 1 belongs to step i. Done: every record's time, in order of arrival.
    ends, filed, done = [0.0], [0.0], [0.0]
    waited = busy = 0.0
    waiting, occupied, behind = [], [], []
    for index, step in enumerate(steps):
        launched = max(ends[-1], filed[max(0, 1 + index - num_slots)])
        waited += launched - ends[-1]
        end = launched + max(forward_s, float(step.host_s.max()))
        # The next step is launched before this one's records are sent.
        sent = max(end, filed[max(0, 2 + index - num_slots)])
        waiting.append(len(done) - bisect_right(done, sent))
        clock = max(filed[-1], sent)
        for record in step.records:
            seconds = record.receive_s + record.file_s + (record.ship_s if one_lock else 0.0)
            clock += seconds
            busy += seconds
            done.append(clock)
        ends.append(end)
        filed.append(clock)
        # Those not filed, and the one in flight.
        occupied.append(min(num_slots, len(filed) - bisect_right(filed, sent) + 1))
        behind.append(clock - end)
    engine_s = ends[-1] - waited
    return Lag(
        forward_s=forward_s,
        step_s=engine_s / len(steps),
        utilisation=busy / engine_s,
        records_waiting=float(np.median(waiting)),
        slots_occupied=float(np.median(occupied)),
        behind_s=float(np.median(behind)),
        max_behind_s=max(behind),
        max_slots_occupied=max(occupied),
        ring_wait_share=waited / ends[-1],
    )
