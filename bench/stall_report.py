"""The report of `stall.py`: table, text, plot and JSON, from the segments of all rounds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from inline_finish import RID_SEPARATOR
from machine import describe
from stall_scores import (
    MILLI,
    WINDOW,
    client_windows,
    finish_steps,
    median,
    p99,
    paired_ratio,
    step_windows,
    undisturbed,
    worst_of,
)
from stall_segment import BUSY_RANK, DELTA, FULL, OFF, STEADY_RANK, Segment

COLOURS = {
    "off": "#555555",
    "off2": "#999999",
    "inline": "#c0392b",
    "inline_compact": "#e08e0b",
    "full": "#1f6fb2",
    "delta": "#2a9d57",
}
# Where the work beside the ranks is done, by the ranks' device.
WHERE_IT_RUNS = {
    "cpu": """Two ranks have {cores} cores here, so both processes, at low priority, live on the
gaps in which ranks wait for each other, and share caches and memory bandwidth with them.""",
    "cuda": """The ranks compute on GPUs; of the host's {cores} cores the step threads take
one each.""",
}
# What the plot's legend calls them.
LABELS = {
    "off": "routing off",
    "off2": "off again (noise)",
    "inline": "inline: step thread serialises 32-bit rows",
    "inline_compact": "inline, compact: step thread slices bytes",
    "full": "full: whole history, beside the ranks",
    "delta": "delta: new rows, beside the ranks",
}
# `off2` lies on `off`.
STYLES = {"off2": "--"}
# Beyond it the short ones would be one line on a linear axis.
MAX_LINEAR_RATIO = 10


@dataclass
class VariantScores:
    """Milliseconds of one variant. By round: the longest latency in the window of each finish."""

    variant: str
    worst: list[list[float]]
    client_worst: list[list[float]]
    # All latencies in windows, and what a finish took altogether: the sum of its window.
    pooled: np.ndarray
    sums: np.ndarray
    # CPU beside the ranks, over a finish.
    processor_cpu_ms: float
    caller_cpu_ms: float
    # Finishes whose window held the busy rank's next prompt.
    num_left_out: int

    @property
    def all_worst(self) -> np.ndarray:
        return np.concatenate([np.asarray(values) for values in self.worst])

    @property
    def num_finishes(self) -> int:
        return len(self.all_worst)


def score(variant: str, segments: list[Segment]) -> VariantScores:
    """Scores of one variant's segments, one a round."""
    windows, client, num_finishes = [], [], 0
    for segment in segments:
        busy, steady = segment.steps[BUSY_RANK], segment.steps[STEADY_RANK]
        finishes = finish_steps(busy, variant + RID_SEPARATOR)
        assert len(finishes) == segment.num_finishes, "every answer has its finish"
        num_finishes += len(finishes)
        finishes = undisturbed(busy, finishes)
        windows.append(step_windows(steady, finishes))
        moments = {entry.step: entry.committed_s for entry in steady}
        client.append(client_windows(segment.arrivals, [moments[step] for step in finishes]))
    flat = np.asarray([window for windows_of_round in windows for window in windows_of_round])
    return VariantScores(
        variant,
        [worst_of(windows_of_round) for windows_of_round in windows],
        [worst_of(windows_of_round) for windows_of_round in client],
        flat.reshape(-1),
        flat.sum(axis=1),
        MILLI * sum(segment.processor_cpu_s for segment in segments) / num_finishes,
        MILLI * sum(segment.caller_cpu_s for segment in segments) / num_finishes,
        num_finishes - len(flat),
    )


def as_json(scores: dict[str, VariantScores]) -> dict[str, Any]:
    return {
        variant: {
            "median_ms": round(median(of.all_worst), 3),
            "p99_ms": round(p99(of.all_worst), 3),
            "max_ms": round(float(of.all_worst.max()), 3),
            "finishes": of.num_finishes,
            "worst_ms": [round(value, 3) for value in of.all_worst.tolist()],
        }
        for variant, of in scores.items()
    }


def score_table(scores: dict[str, VariantScores]) -> str:
    """Rank 1's own clock: what is scored."""
    lines = [
        "| variant | finishes | median ms | p99 ms | max ms | median / off | p99 / off | a window takes, mean ms |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    off = scores[OFF]
    for variant, of in scores.items():
        worst = of.all_worst
        ratios = [
            "1" if variant == OFF else str(paired_ratio(of.worst, off.worst, statistic)) for statistic in (median, p99)
        ]
        lines.append(
            f"| {variant} | {of.num_finishes} | {median(worst):.1f} | {p99(worst):.1f} | {worst.max():.1f} | "
            f"{ratios[0]} | {ratios[1]} | {of.sums.mean():.1f} |"
        )
    return "\n".join(lines)


def client_table(scores: dict[str, VariantScores]) -> str:
    """The stream's reader's clock, and all latencies of the windows without picking the longest."""
    lines = [
        "| variant | reader: median ms | reader: p99 ms | reader: median / off | all latencies: median ms | p99 ms | "
        "output processor: CPU ms a finish | caller: CPU ms a finish |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    off = scores[OFF]
    for variant, of in scores.items():
        client = np.concatenate([np.asarray(values) for values in of.client_worst])
        ratio = "1" if variant == OFF else str(paired_ratio(of.client_worst, off.client_worst, median))
        lines.append(
            f"| {variant} | {median(client):.1f} | {p99(client):.1f} | {ratio} | "
            f"{median(of.pooled):.1f} | {p99(of.pooled):.1f} | "
            f"{of.processor_cpu_ms - off.processor_cpu_ms:+.1f} | {of.caller_cpu_ms - off.caller_cpu_ms:+.1f} |"
        )
    return "\n".join(lines)


def counters_text(state: dict[str, Any]) -> str:
    """What the leader of rank 0 counted itself, in the engine with routing."""
    busy = state["dp_ranks"][BUSY_RANK]
    mean = busy["finish_total_s"] / max(1, busy["num_finished"])
    return (
        f"Rank 0's leader counted {busy['num_finished']} finishes: {mean * 1e6:.0f} microseconds on the step thread on "
        f"average, {busy['finish_max_s'] * 1e6:.0f} at most (inline work not counted). The ring was full "
        f"{busy['routing_ring_waits']} times. Python's collector: {busy['garbage_pauses']} pauses, "
        f"{busy['garbage_pause_s'] * 1e3:.1f} ms together."
    )


def remains_text(scores: dict[str, VariantScores], device: str) -> str:
    """What is left of a finish, and why."""
    off = scores[OFF]

    def beside(variant: str) -> str:
        of = scores[variant]
        processor, caller = of.processor_cpu_ms - off.processor_cpu_ms, of.caller_cpu_ms - off.caller_cpu_ms
        return f"{processor:+.1f} and {caller:+.1f} ms"

    return f"""**What remains.** A finish leaves work beside the ranks: slicing, checksum and sending in the output
processor, receiving and verifying in the caller. That is {beside(FULL)} of CPU a turn with the full history and
{beside(DELTA)} with the delta. {WHERE_IT_RUNS[device].format(cores=os.cpu_count())} The ranks wait for neither."""


def report(
    scores: dict[str, VariantScores], state: dict[str, Any], setting: str, command: str, device: str, picture: str
) -> str:
    worst = {variant: of.all_worst for variant, of in scores.items()}
    added = {variant: median(values) - median(worst[OFF]) for variant, values in worst.items()}
    return f"""# What a finish on one rank does to the steps of another

{describe()}.
{setting}

dp 2: a conversation with a long history finishes its turns on rank 0, a stream decodes on rank 1. Every variant runs once
a round, in an order drawn anew each round; `off2` is `off` again, so its distance from `off` is the noise of this run.

**Window**: the {WINDOW} intervals between rank 1's commits that follow the step in which the request finished, as the
tap on rank 1's leader timed them. What the finishing rank does on its step thread lies in the first one; what the output
processor and the frontend do beside the ranks, in all of them. **Scored** is the longest interval of each window.
In brackets: {95} % intervals of the ratio, by bootstrap over rounds, the same rounds of both variants. Windows that held
rank 0's next prompt are left out: {", ".join(f"{of.num_left_out} of {name}" for name, of in scores.items())}.

{score_table(scores)}

A finish adds at the median: {", ".join(f"{name} {value:+.1f} ms" for name, value in added.items() if name != OFF)}.

As the reader of rank 1's stream sees it, in the benchmark's own process; all latencies of the windows, without picking the
longest; and the CPU time that a turn costs beside the ranks, more than with routing off:

{client_table(scores)}

{counters_text(state)}

{remains_text(scores, device)}

![ECDF of the longest step after a finish, by variant]({picture})

Made by `{command}`.
"""


def plot(worst_ms: dict[str, Sequence[float]], file: Path) -> None:
    """The share of finishes after which rank 1's longest step was at most so long, all variants in one picture. Takes what
    `as_json` keeps, so that the picture can be drawn again without a run."""
    # A machine with GPUs need not have it.
    import matplotlib  # noqa: PLC0415

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415
    from matplotlib.ticker import LogLocator, NullFormatter  # noqa: PLC0415

    figure, axis = plt.subplots(figsize=(9, 6.2), layout="constrained")
    for variant, values in worst_ms.items():
        worst = np.asarray(values)
        label = f"{LABELS[variant]}: median {median(worst):.3g}, p99 {p99(worst):.3g} ms"
        axis.ecdf(worst, color=COLOURS[variant], label=label, linewidth=1.8, linestyle=STYLES.get(variant, "-"))
    shortest, longest = (of([of(values) for values in worst_ms.values()]) for of in (min, max))
    if longest > MAX_LINEAR_RATIO * shortest:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        axis.set_xlim(left=0)
    axis.set_xlabel(f"longest of rank 1's {WINDOW} steps after a finish on rank 0, ms")
    axis.set_ylabel("share of finishes")
    axis.set_title("What a finish on one rank does to the steps of another", loc="left")
    axis.grid(True, color="#e4e4e4", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center")
    figure.savefig(file, dpi=110)
    plt.close(figure)
