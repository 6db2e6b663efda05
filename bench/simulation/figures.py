"""From the steps' costs to the figures that are reported."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .leaders import RING_SLOTS
from .run import BLOCK, Run
from .timeline import StepCost, replay

FORWARDS_MS = (10, 20, 30, 50)
COPY_BYTES = 1 << 27


def per_step(steps: list[StepCost], of: Callable[[StepCost], float]) -> float:
    """What a step costs: the median of the means of blocks of steps, so that a finish counts and a hiccup does not."""
    values = [of(step) for step in steps]
    num_blocks = max(1, len(values) // BLOCK)
    return float(np.median([np.mean(block) for block in np.array_split(values, num_blocks)]))


@dataclass(frozen=True)
class Split:
    """Milliseconds of the output processor a step, and rows a second that it could file at that rate."""

    receive_ms: float
    file_ms: float
    ship_ms: float
    all_ms: float
    capacity_rows_s: float

    @staticmethod
    def of(steps: list[StepCost]) -> Split:
        all_s = per_step(steps, lambda step: step.output_s)
        return Split(
            receive_ms=1e3 * per_step(steps, lambda step: sum(record.receive_s for record in step.records)),
            file_ms=1e3 * per_step(steps, lambda step: sum(record.file_s for record in step.records)),
            ship_ms=1e3 * per_step(steps, lambda step: sum(record.ship_s for record in step.records)),
            all_ms=1e3 * all_s,
            capacity_rows_s=per_step(steps, lambda step: step.num_rows) / all_s,
        )


def figures_of(run: Run) -> dict[str, Any]:
    """One variant at one size. `limit_dp`: how many dp ranks one output processor keeps up with, by forward time, if a rank
    costs what it costs here."""
    split = Split.of(run.steps)
    rows, shipped = (
        per_step(run.steps, of) for of in (lambda step: step.num_rows, lambda step: step.num_bytes_shipped)
    )
    host = np.stack([step.host_s for step in run.steps])
    return {
        "dp": run.dp_size,
        "variant": run.variant,
        "steps": len(run.steps) + len(run.before),
        "finish_share": run.finish_share,
        "rows_per_step": rows,
        "bytes_shipped_per_step": shipped,
        "needed_rows_s": {str(ms): rows / ms * 1e3 for ms in FORWARDS_MS},
        "output": asdict(split),
        "output_before": asdict(Split.of(run.before)) if run.before else None,
        "limit_dp": {str(ms): run.dp_size * ms / split.all_ms for ms in FORWARDS_MS},
        "lag": {str(ms): asdict(replay(run.steps, ms / 1e3, RING_SLOTS)) for ms in FORWARDS_MS},
        "lag_before": {str(ms): asdict(replay(run.before, ms / 1e3, RING_SLOTS)) for ms in FORWARDS_MS}
        if run.before
        else None,
        "leader_us": {"median": 1e6 * float(np.median(host)), "p99": 1e6 * float(np.quantile(host, 0.99))},
        "frontend_link_ms": 1e3 * per_step(run.steps, lambda step: step.link_s),
        "answers": run.totals.num_answers,
        "rows_shipped": run.totals.num_rows,
        "rows_compared": run.totals.num_rows_compared,
    }


def prefill_figures(dp_size: int, steps: list[StepCost], before: list[StepCost]) -> dict[str, Any]:
    """Steps in which ranks prefill a chunk each."""
    return {
        "dp": dp_size,
        "rows_per_step": float(np.median([step.num_rows for step in steps])),
        "rows_s": float(np.median([step.num_rows / step.output_s for step in steps])),
        "rows_s_before": float(np.median([step.num_rows / step.output_s for step in before])),
    }


def copy_bandwidth() -> float:
    """Bytes a second that one thread copies, from memory to memory."""
    source, target = np.ones(COPY_BYTES, np.uint8), np.zeros(COPY_BYTES, np.uint8)
    seconds = []
    for _ in range(5):
        began = time.thread_time()
        np.copyto(target, source)
        seconds.append(time.thread_time() - began)
    return COPY_BYTES / float(np.median(seconds))
