"""What a rollout shows, and that it says so when something is wrong."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from waybill.engine.config import EngineConfig
from waybill.launch.args import parse_worker_args
from waybill.rollout.report import RolloutReport, TurnReport, print_report, report_json, save_expert_load

TURNS = [
    TurnReport(0, 0, "start with 12", "12", "12", 14, 3, 0, 0, 16, 384),
    TurnReport(0, 1, "add 30", "41", "42", 26, 3, 16, 16, 12, 288),
]


def make(errors: list[str], *, unexplained: bool = False) -> RolloutReport:
    return RolloutReport(TURNS, errors, 28, 0, 2.0, "0 of 28 rows differ", unexplained)


def shown(report: RolloutReport) -> str:
    console = Console(file=StringIO(), width=80)
    print_report(console, report, None)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_every_turn_is_a_row_of_80_columns() -> None:
    text = shown(make([]))
    (line,) = [line for line in text.splitlines() if "add 30" in line]
    assert line.split() == ["0", "1", "add", "30", "41", "not", "42", "26", "16", "16", "12", "288"]
    assert "2 turns, 50% right; 28 rows, 672 bytes; 3 tokens/s" in text
    assert "byte for byte, 28 rows" in text
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text


@pytest.mark.parametrize(
    ("report", "equal"), [(make([]), True), (make(["a gap"]), False), (make([], unexplained=True), False)]
)
def test_the_json_says_whether_everything_was_equal(report: RolloutReport, equal: bool) -> None:
    options = parse_worker_args(["rollout"]).rollout
    assert options is not None
    parsed = json.loads(report_json(report, EngineConfig(model_path="x", tp_size=2), {"dtype": "float32"}, options))
    assert parsed["stitched_equals_one_shot"] is equal is not report.is_wrong
    assert (parsed["rows"], parsed["routed_bytes"], parsed["bytes_per_row"], parsed["cached_tokens"]) == (
        28,
        672,
        24,
        16,
    )
    assert parsed["accuracy"] == 0.5


def test_errors_are_shown() -> None:
    assert "wrong routes: a gap" in shown(make(["a gap"]))


def test_the_picture_is_written_where_it_was_asked_for(tmp_path: Path) -> None:
    routes = [np.arange(48, dtype=np.uint8).reshape(4, 6, 2) % 16]
    picture = save_expert_load(routes, {"num_experts": 16}, str(tmp_path / "deep" / "out"))
    assert picture.is_file() and picture.read_bytes().startswith(b"\x89PNG")
