"""Finishes on all ranks but one, from the leaders' logs."""

from __future__ import annotations

import pytest
import stall_scores
from stall_everywhere import BusySegment, busy_segment, scores
from stall_segment import FULL, OFF
from step_log import StepEntry


def log(finished: dict[int, list[str]], num_tokens: dict[int, int] | None = None) -> list[StepEntry]:
    """Ten steps, ten milliseconds each, but the fifth, which takes 50."""
    times = [0.01 * step + 0.04 * (step >= 5) for step in range(10)]
    tokens = num_tokens or {}
    return [StepEntry(step, times[step], tokens.get(step, 1), 1, finished.get(step, [])) for step in range(10)]


def test_all_intervals_from_the_first_finish_to_the_last_are_scored() -> None:
    steps = [log({3: ["a"]}), log({4: ["stream"]}), log({4: ["b"], 7: ["c"]})]
    answered = {"a": 0.032, "b": 0.043, "c": 0.120}
    segment = busy_segment(steps, answered, 0.5, 0.25)
    assert segment.intervals == pytest.approx([10, 50, 10, 10])
    assert segment.num_with_finish == 2
    assert segment.lags == pytest.approx([2, 3, 10])


def test_steps_without_the_steady_rank_are_left_out() -> None:
    """Its stream has not begun, or has ended."""
    steps = [log({1: ["a"], 8: ["b"]}), log({}, {1: 0, 7: 0, 8: 0})]
    assert busy_segment(steps, {"a": 1.0, "b": 1.0}, 0.0, 0.0).intervals == pytest.approx([10, 10, 50, 10])


def test_an_answer_without_its_finish_is_an_error() -> None:
    with pytest.raises(AssertionError, match="every answer has its finish"):
        busy_segment([log({3: ["a"]}), log({})], {"a": 1.0, "b": 1.0}, 0.0, 0.0)


def test_ratios_are_over_routing_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stall_scores, "NUM_RESAMPLES", 20)
    off = BusySegment([10.0, 10.0, 10.0], 2, [1.0], 0.001, 0.002)
    full = BusySegment([11.0, 11.0, 11.0], 3, [4.0, 6.0], 0.004, 0.002)
    found = {line["variant"]: line for line in scores({OFF: [off, off], FULL: [full, full]})}
    assert found[OFF]["median_over_off"] == (1, 1, 1)
    assert found[FULL]["median_over_off"] == pytest.approx((1.1, 1.1, 1.1))
    assert (found[FULL]["with_finish"], found[FULL]["lag_median_ms"], found[FULL]["processor_cpu_ms"]) == (1, 5, 2)
