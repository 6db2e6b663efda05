"""What the leaders of a simulated engine sent and what stood in the ring, to be played again at an engine's own pace."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class TapeStep:
    """One step: the slot that its forward filled, if it ran one, as rows of the rule's table; and the records sent."""

    num_slot_rows: int = 0
    places: list[np.ndarray] = field(default_factory=list)
    entries: list[np.ndarray] = field(default_factory=list)
    records: list[bytes] = field(default_factory=list)


@dataclass
class Tape:
    """`timed_from` and `timed_to` are the steps that are played at the engine's pace; the others as fast as they go."""

    steps: list[TapeStep] = field(default_factory=lambda: [TapeStep()])
    timed_from: int = 0
    timed_to: int = 0

    @property
    def last(self) -> TapeStep:
        return self.steps[-1]

    def turn(self) -> None:
        """The step is over."""
        self.steps.append(TapeStep())
