"""What a rollout shows: a table, a picture of the expert load, and one JSON object."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from ..engine.config import EngineConfig
from ..launch.args import RolloutCommand

matplotlib.use("Agg")

PICTURE = "expert_load.png"


@dataclass(frozen=True)
class TurnReport:
    """One turn as it is shown."""

    conversation: int
    turn: int
    user: str
    answer: str
    expected: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    start: int
    rows: int
    routed_bytes: int

    @property
    def is_right(self) -> bool:
        return self.answer.strip() == self.expected


@dataclass
class RolloutReport:
    """All turns, what went wrong, and how the routes compare with those of a fresh prefill.

    `verdict` says what the differences from the fresh prefill are; `unexplained` that they are more than near-ties.
    """

    turns: list[TurnReport]
    errors: list[str]
    rows_compared: int
    fresh_prefill_rows_different: int
    seconds: float
    verdict: str = ""
    unexplained: bool = False

    @property
    def is_wrong(self) -> bool:
        return bool(self.errors) or self.unexplained

    @property
    def rows(self) -> int:
        return sum(turn.rows for turn in self.turns)

    @property
    def routed_bytes(self) -> int:
        return sum(turn.routed_bytes for turn in self.turns)

    @property
    def accuracy(self) -> float:
        return sum(turn.is_right for turn in self.turns) / len(self.turns)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens over the wall time of all conversations, prefills included."""
        return sum(turn.completion_tokens for turn in self.turns) / self.seconds


def print_report(console: Console, report: RolloutReport, picture: Path | None) -> None:
    # Fits 80 columns with the embedded model.
    table = Table(
        title="turns and the routes that came with them", box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False
    )
    for name in ("conv", "turn", "user", "answer", ""):
        table.add_column(name, no_wrap=True)
    for name in ("prompt", "cached", "from", "rows", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    for turn in report.turns:
        mark = "[green]right[/]" if turn.is_right else f"[red]not {turn.expected}[/]"
        table.add_row(
            str(turn.conversation),
            str(turn.turn),
            turn.user,
            turn.answer[:24],
            mark,
            str(turn.prompt_tokens),
            str(turn.cached_tokens),
            str(turn.start),
            str(turn.rows),
            str(turn.routed_bytes),
            end_section=turn.turn == max(other.turn for other in report.turns),
        )
    console.print(table)
    console.print(
        f"{len(report.turns)} turns, {report.accuracy:.0%} right; {report.rows} rows, {report.routed_bytes} bytes; "
        f"{report.tokens_per_s:.0f} tokens/s"
    )
    for error in report.errors:
        console.print(f"[red]wrong routes: {error}")
    if not report.errors:
        console.print(f"[green]stitched deltas = one full answer, byte for byte, {report.rows_compared} rows")
    console.print(f"fresh prefill after a flush: {report.verdict}")
    if picture is not None:
        console.print(f"expert load: {picture}", soft_wrap=True)


def save_expert_load(routes: Sequence[np.ndarray], facts: Mapping[str, Any], out: str) -> Path:
    """A heat map of how often each expert was chosen, per MoE layer; returns its path."""
    num_experts = int(facts["num_experts"])
    rows = np.concatenate(routes)
    shares = np.stack([np.bincount(rows[:, layer].ravel(), minlength=num_experts) for layer in range(rows.shape[1])])
    shares = shares / shares.sum(axis=1, keepdims=True)
    figure = Figure(
        figsize=(max(6.0, num_experts * 0.18 + 2), max(3.0, len(shares) * 0.22 + 1.5)), layout="constrained"
    )
    axes = figure.add_subplot()
    image = axes.imshow(shares * num_experts, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set(xlabel="expert", ylabel="MoE layer", title=f"expert load, {len(rows)} tokens (1 = even share)")
    axes.set_yticks(range(0, len(shares), max(1, len(shares) // 12)))
    figure.colorbar(image, label="times the even share")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / PICTURE
    figure.savefig(picture, dpi=120)
    return picture.resolve()


def report_json(report: RolloutReport, config: EngineConfig, facts: Mapping[str, Any], options: RolloutCommand) -> str:
    return json.dumps(
        {
            "conversations": options.conversations,
            "turns": options.turns,
            "tp": config.tp_size,
            "rows": report.rows,
            "routed_bytes": report.routed_bytes,
            "bytes_per_row": report.routed_bytes / report.rows if report.rows else 0,
            "cached_tokens": sum(turn.cached_tokens for turn in report.turns),
            "stitched_equals_one_shot": not report.is_wrong,
            "tokens_per_s": round(report.tokens_per_s, 1),
            "fresh_prefill_rows_different": report.fresh_prefill_rows_different,
            "accuracy": report.accuracy,
            "dtype": facts["dtype"],
        }
    )
