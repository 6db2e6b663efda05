"""Results as lines of text for a terminal or a log, and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from .rule import Outcome, Result, Rule

MARKS: dict[Outcome, str] = {"passed": "ok", "failed": "FAILED", "not applicable": "n/a"}
MARK_WIDTH, NAME_WIDTH = 8, 16


def result_line(result: Result) -> str:
    """One line, without colours."""
    detail = " ".join(result.detail.split())
    return f"{MARKS[result.outcome]:<{MARK_WIDTH}}{result.rule.name:<{NAME_WIDTH}}{result.seconds:6.2f} s  {detail}"


def rule_line(rule: Rule) -> str:
    return f"{rule.name:<{NAME_WIDTH}}{rule.statement}" + (" (extension)" if rule.is_extension else "")


def summary_lines(results: Sequence[Result]) -> list[str]:
    """How many of each outcome, and the statements of those that failed."""
    counts = Counter(result.outcome for result in results)
    broken = [f"  {rule_line(result.rule)}" for result in results if result.outcome == "failed"]
    words = ", ".join(f"{counts[outcome]} {outcome}" for outcome in MARKS)
    return [words, *(["broken:", *broken] if broken else [])]


def as_json(url: str, seed: int, results: Sequence[Result]) -> dict[str, Any]:
    counts = Counter(result.outcome for result in results)
    return {
        "url": url,
        "seed": seed,
        **{outcome.replace(" ", "_"): counts[outcome] for outcome in MARKS},
        "rules": [
            {
                "name": result.rule.name,
                "statement": result.rule.statement,
                "is_extension": result.rule.is_extension,
                "outcome": result.outcome,
                "detail": result.detail,
                "seconds": round(result.seconds, 3),
            }
            for result in results
        ],
    }
