"""The simulation runs whole at a small size, its own checks pass, and its figures keep their invariants; the virtual clock
is right where one can say what it must show."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).parents[3] / "bench"
sys.path.insert(0, str(BENCH))

from simulation.output import RecordCost  # noqa: E402
from simulation.timeline import StepCost, replay  # noqa: E402


@pytest.fixture(scope="module")
def result() -> dict:
    command = [sys.executable, str(BENCH / "simulate.py"), "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_variant_runs_at_every_size_and_all_rows_are_compared(result: dict) -> None:
    assert {(run["dp"], run["variant"]) for run in result["runs"]} == {
        (dp, variant) for dp in (2, 4) for variant in ("delta", "full", "stream")
    }
    for run in result["runs"]:
        assert run["answers"] >= 8 * run["dp"] and 0 < run["rows_compared"] == run["rows_shipped"]
        assert run["rows_per_step"] >= 8 * run["dp"] * 0.9


def test_figures_agree_with_each_other(result: dict) -> None:
    rows = {(run["dp"], run["variant"]): run["rows_shipped"] for run in result["runs"]}
    for run in result["runs"]:
        assert rows[run["dp"], "full"] > 2 * rows[run["dp"], "delta"]
        for costs in (run["output"], run["output_before"]):
            assert 0 < max(costs["receive_ms"], costs["file_ms"], costs["ship_ms"]) < costs["all_ms"] * 1.5
        assert run["needed_rows_s"]["10"] == pytest.approx(5 * run["needed_rows_s"]["50"])
        for ms, lag in run["lag"].items():
            assert lag["step_s"] >= int(ms) / 1e3 - 1e-9 and lag["max_slots_occupied"] <= 8
    assert all(prefill["rows_s"] > 0 for prefill in result["prefill"])


def steps_of(num_steps: int, num_records: int, file_s: float, ship_s: float = 0.0) -> list[StepCost]:
    records = [RecordCost(0.0, file_s, ship_s)] * num_records
    return [StepCost(np.array([0.001]), records, num_records, 0, 0)] * num_steps


def test_an_output_processor_that_keeps_up_is_behind_by_its_own_work_alone() -> None:
    lag = replay(steps_of(50, 4, 0.001), 0.010, num_slots=4)
    assert lag.behind_s == pytest.approx(0.004) and lag.utilisation == pytest.approx(0.4)
    assert (lag.records_waiting, lag.ring_wait_share, lag.max_slots_occupied) == (0, 0.0, 2)
    assert replay(steps_of(50, 4, 0.0), 0.0005, num_slots=4).step_s == pytest.approx(0.001), "the host's work is longer"


def test_a_slow_one_fills_the_ring_and_then_sets_the_pace() -> None:
    lag = replay(steps_of(400, 4, 0.005), 0.010, num_slots=4)
    assert lag.utilisation == pytest.approx(2.0) and lag.max_slots_occupied == 4
    assert lag.ring_wait_share == pytest.approx(0.5, abs=0.02), "20 ms of filing for every 10 ms of forward"
    assert lag.records_waiting >= 4 and lag.behind_s > 0.020


def test_shipping_counts_unless_it_has_a_lock_of_its_own() -> None:
    steps = steps_of(50, 2, 0.001, ship_s=0.003)
    assert replay(steps, 0.010, 4).utilisation == pytest.approx(0.8)
    assert replay(steps, 0.010, 4, one_lock=False).utilisation == pytest.approx(0.2)
