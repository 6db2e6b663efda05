"""The stall benchmark finds a stall that is there, and none that is not."""

from __future__ import annotations

import base64
import pickle
from pathlib import Path

import numpy as np
import pytest
from inline_finish import INLINE, INLINE_COMPACT, InlineFinish
from stall_scores import (
    WINDOW,
    client_windows,
    finish_steps,
    median,
    paired_ratio,
    step_windows,
    undisturbed,
    worst_of,
)
from step_log import StepEntry, StepLogReader, StepTap
from support.replica_harness import Replica
from tapped_engine import tap

from waybill.engine.config import EngineConfig
from waybill.engine.io_struct import SamplingParams
from waybill.engine.routing.geometry import RouteGeometry
from waybill.launch.supervisor import agent_command

STEP_S, STALL_S = 0.05, 0.2


def timeline(num_steps: int, stalled: set[int]) -> list[StepEntry]:
    """Steps of a steady rank; in the `stalled` ones it waited."""
    now, entries = 0.0, []
    for step in range(num_steps):
        now += STEP_S + STALL_S * (step in stalled)
        entries.append(StepEntry(step, now, 1, 1, []))
    return entries


def test_the_first_interval_after_a_finish_holds_the_stall() -> None:
    finishes = [10, 20]
    windows = step_windows(timeline(30, {11, 21}), finishes)
    assert windows == [pytest.approx([250, 50, 50]), pytest.approx([250, 50, 50])]
    assert worst_of(windows) == pytest.approx([250, 250])
    assert worst_of(step_windows(timeline(30, {5, 15}), finishes)) == pytest.approx([50, 50])


def test_the_reader_sees_the_stall_in_the_tokens_after_it() -> None:
    steady = timeline(30, {11})
    arrivals = [entry.committed_s + 0.001 for entry in steady]
    (window,) = client_windows(arrivals, [steady[10].committed_s])
    assert len(window) == WINDOW
    assert max(window) == pytest.approx(250)


def test_finishes_are_told_apart_by_variant() -> None:
    entries = [StepEntry(0, 0.0, 1, 1, ["full/0/0"]), StepEntry(1, 0.1, 1, 1, []), StepEntry(2, 0.2, 1, 1, ["off/0/0"])]
    assert finish_steps(entries, "full/") == [0]
    assert finish_steps(entries, "off/") == [2]


def test_a_window_with_the_next_prompt_in_it_is_left_out() -> None:
    prompts = {0, 13, 24}
    busy = [StepEntry(step, 0.1 * step, 8 * (step in prompts), 0, []) for step in range(30)]
    assert undisturbed(busy, [10, 20]) == [20]


def test_ratio_and_its_interval() -> None:
    rng = np.random.default_rng(0)
    ours = [rng.normal(100, 1, 8).tolist() for _ in range(20)]
    same = paired_ratio(ours, ours, median)
    assert (same.value, same.low, same.high) == (1, 1, 1)
    twice = paired_ratio([[2 * value for value in values] for values in ours], ours, median)
    assert (twice.value, twice.low, twice.high) == pytest.approx((2, 2, 2))
    other = paired_ratio([rng.normal(100, 1, 8).tolist() for _ in range(20)], ours, median)
    assert other.low < 1 < other.high


@pytest.fixture
def replica() -> Replica:
    config = EngineConfig(model_path="", page_size=1, max_running_requests=4)
    return Replica(config, num_pages=200, context_length=128)


@pytest.mark.parametrize("variant", [INLINE, INLINE_COMPACT, "full"])
def test_inline_work_covers_the_whole_history_before_its_pages_go(variant: str, replica: Replica) -> None:
    geometry = RouteGeometry((0, 1, 2), 3, 64, 4, 128)
    work = InlineFinish(200, geometry)
    made: list[tuple[np.ndarray, bytes]] = []
    for name, ship in list(work._work.items()):
        work._work[name] = lambda slots, ship=ship: made.append((slots, ship(slots)))  # type: ignore[misc]
    work.install(replica.scheduler, page_size=1)
    replica.submit(f"{variant}/0/0", list(range(1, 21)), SamplingParams(max_new_tokens=5, ignore_eos=True))
    replica.run_until_idle()
    if variant == "full":
        assert not made
        return
    ((slots, shipped),) = made
    assert len(set(slots.tolist())) == 20 + 5 - 1
    compact = work._compact[slots]
    if variant == INLINE:
        assert shipped == base64.b64encode(pickle.dumps(compact.astype(np.int32), protocol=5))
    else:
        assert shipped == compact.tobytes()


def test_the_tap_logs_every_step_and_hands_it_over_with_the_state(replica: Replica, tmp_path: Path) -> None:
    file = tmp_path / "leader0.steps"
    StepTap(replica.scheduler, file, iter(range(1000)).__next__).install()
    reader = StepLogReader(file)
    steps = []
    for number in range(2):
        replica.submit(f"off/{number}", [1, 2, 3], SamplingParams(max_new_tokens=4, ignore_eos=True))
        replica.run_until_idle()
        replica.scheduler.state()
        steps.append(reader.take())
    for number, entries in enumerate(steps):
        assert [entry.finished for entry in entries if entry.finished] == [[f"off/{number}"]]
        assert sum(entry.num_sampled for entry in entries) == 4
    assert [entry.step for entries in steps for entry in entries] == list(range(len(steps[0]) + len(steps[1])))
    assert reader.take() == []


def test_only_the_worker_differs_from_the_engines_own_command() -> None:
    own = agent_command(2, "/tmp/run")
    tapped = tap(own)
    assert [part for part in tapped if part not in own] == [
        part for part in tapped if part.endswith("tapped_worker.py")
    ]
    assert tapped[-3:] == own[-3:]
