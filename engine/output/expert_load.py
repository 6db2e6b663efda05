"""How often each expert is chosen, for whoever looks: a sample of the rows that are filed, taken only while somebody asks.

The filing thread copies a few rows of a step now and then, whatever the step's size; the thread of the questions counts
them. Without a question for `WATCH_S` the filing thread only reads a clock.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import numpy as np

from ..ipc.output_queries import ExpertLoadReply
from ..routing.geometry import RouteGeometry

# How long a question keeps the sampling alive.
WATCH_S = 5.0
# A processor samples a step as often as this, each of its dp ranks in its turn, and at most so many of its rows.
SAMPLE_PERIOD_S = 0.1
MAX_SAMPLE_ROWS = 256
# Samples that wait to be counted; the oldest make room.
MAX_SAMPLES = 32


class ExpertLoad:
    """`offer` belongs to the filing thread, `take` to the one that answers questions."""

    def __init__(self, num_dp_ranks: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self._period_s = SAMPLE_PERIOD_S * num_dp_ranks
        self._clock = clock
        self._watched_until = float("-inf")
        self._next_sample: dict[int, float] = {}
        self._samples: deque[np.ndarray] = deque(maxlen=MAX_SAMPLES)
        self.geometry: RouteGeometry | None = None

    def offer(self, dp_rank: int, rows: np.ndarray) -> None:
        """Rows [M, n, K] of a step, which are copied if one is due: evenly spaced ones, where there are many."""
        now = self._clock()
        if now >= self._watched_until or now < self._next_sample.get(dp_rank, now):
            return
        self._next_sample[dp_rank] = now + self._period_s
        stride = -(-rows.shape[1] // MAX_SAMPLE_ROWS)
        self._samples.append(rows[:, ::stride].copy())

    def take(self, op_id: str) -> ExpertLoadReply:
        """What was sampled since the last call, counted. Sampling goes on for `WATCH_S`."""
        now = self._clock()
        if now >= self._watched_until:
            # From an earlier watch.
            self._samples.clear()
        self._watched_until = now + WATCH_S
        geometry = self.geometry
        if geometry is None:
            return ExpertLoadReply(op_id, (), 0, 0, b"")
        counts = np.zeros((geometry.num_moe_layers, geometry.num_experts), dtype="<u4")
        num_rows = 0
        while self._samples:
            rows = self._samples.popleft()
            num_rows += rows.shape[1]
            counts += count_ids(rows, geometry.num_experts)
        return ExpertLoadReply(op_id, geometry.layer_ids, geometry.num_experts, num_rows, counts.tobytes())


def count_ids(rows: np.ndarray, num_experts: int) -> np.ndarray:
    """How often each id stands in each layer of `rows` [M, n, K]: uint32 [M, num_experts]."""
    num_layers = len(rows)
    ids = rows.reshape(num_layers, -1) + np.arange(num_layers)[:, None] * num_experts
    return np.bincount(ids.ravel(), minlength=num_layers * num_experts).reshape(num_layers, -1).astype("<u4")
