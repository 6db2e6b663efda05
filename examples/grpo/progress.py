"""What a user sees of the loop: a live table, a log of JSON lines, a plot at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

# Figure, heading and form.
COLUMNS = {
    "step": ("step", "{:d}"),
    "reward": ("reward", "{:.3f}"),
    "signal": ("signal", "{:.0%}"),
    "mismatch_kl": ("KL", "{:.1e}"),
    "extreme_share": ("extreme", "{:.2%}"),
    "rollout_s": ("rollout s", "{:.2f}"),
    "train_s": ("train s", "{:.2f}"),
    "sync_s": ("sync s", "{:.2f}"),
    "tokens_per_s": ("tokens/s", "{:,.0f}"),
}
ROWS_SHOWN = 12
SMOOTHING = 5


class ProgressReport:
    """Use as a context; `add` a step's figures."""

    def __init__(self, out: Path, num_steps: int, title: str) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.log_file = out / "log.jsonl"
        self.plot_file = out / "plot.png"
        self._title = title
        self._steps: list[dict[str, Any]] = []
        self._log = self.log_file.open("w")
        self._bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._task = self._bar.add_task("starting", total=num_steps)
        self._console = Console()
        self._live = Live(self._render(), console=self._console, refresh_per_second=4)

    def __enter__(self) -> ProgressReport:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()
        if not self._console.is_terminal:
            # Ends the bar's line.
            self._console.print()
        self._log.close()
        if self._steps:
            self._plot()

    def say(self, doing: str) -> None:
        """What the loop does now."""
        self._bar.update(self._task, description=f"{doing:<10}")

    def add(self, step: dict[str, Any]) -> None:
        self._steps.append(step)
        self._log.write(json.dumps(step) + "\n")
        self._log.flush()
        self._bar.advance(self._task)
        self._live.update(self._render())
        if not self._console.is_terminal:
            cells = [f"{heading} {form.format(step[name])}" for name, (heading, form) in COLUMNS.items()]
            self._console.print("  ".join(cells), soft_wrap=True)

    def _render(self) -> Group:
        table = Table(title=self._title)
        for heading, _ in COLUMNS.values():
            table.add_column(heading, justify="right")
        for step in self._steps[-ROWS_SHOWN:]:
            table.add_row(*(form.format(step[name]) for name, (_, form) in COLUMNS.items()))
        return Group(table, self._bar)

    def _plot(self) -> None:
        figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
        numbers = [step["step"] for step in self._steps]
        for axis, name, label in zip(
            axes,
            ("reward", "mismatch_kl", "extreme_share"),
            ("reward: share of right turns", "KL(engine || trainer)", "tokens with a ratio above 2"),
            strict=True,
        ):
            values = [step[name] for step in self._steps]
            axis.plot(numbers, values, color="tab:blue", alpha=0.35, linewidth=1, label="step")
            axis.plot(numbers, smoothed(values), color="tab:blue", linewidth=2, label=f"mean of the last {SMOOTHING}")
            axis.set(xlabel="step", title=label)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.legend()
            axis.grid(alpha=0.3)
        axes[1].set_yscale("log")
        figure.suptitle(self._title)
        figure.savefig(self.plot_file, dpi=110)
        plt.close(figure)


def smoothed(values: list[float]) -> list[float]:
    """Mean of the last few."""
    return [
        sum(values[max(0, i - SMOOTHING + 1) : i + 1]) / len(values[max(0, i - SMOOTHING + 1) : i + 1])
        for i in range(len(values))
    ]
