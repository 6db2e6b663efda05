"""What a finish on rank 0 did to the latencies of rank 1: windows, percentiles, and intervals of their ratios.

Pure: `StepEntry` lists and times in, numbers out.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from step_log import StepEntry

# Intervals of rank 1 after the step in which the finish was committed.
WINDOW = 3
NUM_RESAMPLES = 4000
CONFIDENCE = 95
MILLI = 1e3

Statistic = Callable[[np.ndarray], float]


def median(values: np.ndarray) -> float:
    return float(np.median(values))


def p99(values: np.ndarray) -> float:
    return float(np.percentile(values, 99))


def finish_steps(busy: Sequence[StepEntry], prefix: str) -> list[int]:
    """Steps in which requests whose rid begins with `prefix` finished."""
    return [entry.step for entry in busy if any(rid.startswith(prefix) for rid in entry.finished)]


def undisturbed(busy: Sequence[StepEntry], finishes: Sequence[int]) -> list[int]:
    """Those of the finishes whose window holds no work of the busy rank itself. Its next prompt comes when the stream's
    reader has seen a few tokens more, and may come early if they arrived in one burst."""
    working = {entry.step for entry in busy if entry.num_tokens}
    return [finish for finish in finishes if working.isdisjoint(range(finish + 1, finish + 1 + WINDOW))]


def step_windows(steady: Sequence[StepEntry], finishes: Sequence[int]) -> list[list[float]]:
    """By finish, milliseconds between the commits of the steady rank: those of the `WINDOW` steps after the finish's own.

    A leader that finishes a request comes late to the agreement that follows. The others commit the step after the finish
    behind that agreement, so the window's first interval holds the delay, and the later ones what goes on beside the ranks.
    """
    committed = {entry.step: entry.committed_s for entry in steady}
    return [
        [MILLI * (committed[step] - committed[step - 1]) for step in range(finish + 1, finish + 1 + WINDOW)]
        for finish in finishes
    ]


def client_windows(arrivals: Sequence[float], finished_s: Sequence[float]) -> list[list[float]]:
    """By finish, milliseconds between the tokens that the stream's reader got, from the first one after the finish on."""
    windows = []
    for moment in finished_s:
        first = bisect.bisect_right(arrivals, moment)
        ends = range(max(first, 1), min(first + WINDOW, len(arrivals)))
        windows.append([MILLI * (arrivals[i] - arrivals[i - 1]) for i in ends])
    return windows


def worst_of(windows: Sequence[Sequence[float]]) -> list[float]:
    """The longest latency of each window."""
    return [max(window) for window in windows if window]


@dataclass(frozen=True)
class Ratio:
    """A statistic of one variant over that of another, with the bounds of its confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def paired_ratio(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], statistic: Statistic, seed: int = 0
) -> Ratio:
    """Bootstrap over rounds: values come by round, and a resample takes the same rounds of both."""
    assert len(ours) == len(theirs)
    a, b = [np.asarray(values) for values in ours], [np.asarray(values) for values in theirs]
    rng = np.random.default_rng(seed)
    ratios = []
    for _ in range(NUM_RESAMPLES):
        rounds = rng.integers(0, len(a), len(a))
        ratios.append(
            statistic(np.concatenate([a[i] for i in rounds])) / statistic(np.concatenate([b[i] for i in rounds]))
        )
    tail = (100 - CONFIDENCE) / 2
    low, high = np.percentile(ratios, [tail, 100 - tail])
    return Ratio(statistic(np.concatenate(a)) / statistic(np.concatenate(b)), float(low), float(high))
