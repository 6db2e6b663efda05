"""The stall benchmark's tap and inline work on real ranks: one short segment, scored."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[2] / "bench"))

from stall_scores import WINDOW, finish_steps, step_windows
from stall_segment import BUSY_RANK, FULL, STEADY_RANK, run_segment
from tapped_engine import TappedEngine

NUM_TURNS = 2


def test_a_segment_has_a_window_for_every_finish(checkpoint: str) -> None:
    tapped = TappedEngine(
        checkpoint, dp_size=2, tp_size=1, with_inline=True, enable_return_routed_experts=True, kv_cache_tokens=8192
    )
    try:
        tapped.take_steps()
        segment = asyncio.run(run_segment(tapped, FULL, "0", [], NUM_TURNS, np.random.default_rng(0)))
    finally:
        tapped.close()
    finishes = finish_steps(segment.steps[BUSY_RANK], FULL)
    assert segment.num_finishes == len(finishes) == NUM_TURNS
    windows = step_windows(segment.steps[STEADY_RANK], finishes)
    assert [len(window) for window in windows] == [WINDOW] * NUM_TURNS
    assert min(min(window) for window in windows) > 0
