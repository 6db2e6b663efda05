"""What a benchmark's script prints reaches the one that started it, whatever becomes of the script."""

from __future__ import annotations

import sys
from pathlib import Path

from marked_results import MARK, Found, keep, load_kept, read_results, start

DONE = f"""print('{MARK}{{"kind": "done"}}', flush=True)"""
ONE = f"""print('other words'); print('{MARK}{{"kind": "size", "bytes": 3}}', flush=True)"""


def run(code: str, timeout_s: float = 60.0) -> tuple[list[dict[str, int]], str]:
    found = read_results("it", start([sys.executable, "-S", "-c", code]), timeout_s)
    return found.of("size"), found.failure


def test_results_by_kind() -> None:
    assert run(f"{ONE}; {DONE}") == ([{"bytes": 3}], "")


def test_what_came_before_a_failure_is_kept() -> None:
    assert run(f"{ONE}; raise SystemExit(3)") == ([{"bytes": 3}], "exit status 3")
    assert run(ONE) == ([{"bytes": 3}], "exit status 0")


def test_one_that_takes_too_long_is_ended() -> None:
    assert run(f"{ONE}; import time; time.sleep(60)", 0.5) == ([{"bytes": 3}], "killed after 0.5 s")


def test_results_are_kept_for_later_calls(tmp_path: Path) -> None:
    file = tmp_path / "kept.json"
    kept = {"a": Found("a", {"size": [{"bytes": 3}]}), "b": Found("b", failure="exit status 3")}
    assert load_kept(file) == load_kept(None) == {}
    keep(file, kept)
    assert load_kept(file) == kept
    keep(None, kept)
