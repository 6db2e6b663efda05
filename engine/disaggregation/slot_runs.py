"""KV slots that lie beside each other on both sides of a copy: a run of them is one long piece in each layer. Pure."""

from __future__ import annotations

import numpy as np

# First slot there, first slot here, slots.
SlotRun = tuple[int, int, int]


def slot_runs(there: np.ndarray, here: np.ndarray) -> list[SlotRun]:
    """Runs of the pairs `there[i]`, `here[i]`, [n] int64, no slot of `here` twice. Both may fall, as those of pages that a
    pool gives out do: a run has no direction."""
    if not len(there):
        return []
    steps, others = np.diff(there), np.diff(here)
    firsts = np.concatenate(([0], np.flatnonzero((steps != others) | (np.abs(steps) != 1)) + 1))
    lasts = np.append(firsts[1:], len(there)) - 1
    begins = [np.minimum(slots[firsts], slots[lasts]).tolist() for slots in (there, here)]
    return list(zip(*begins, (lasts - firsts + 1).tolist(), strict=True))
