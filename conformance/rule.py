"""What a rule is, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .server import Server

Outcome = Literal["passed", "failed", "not applicable"]


@dataclass(frozen=True)
class Rule:
    """`check` returns what it looked at, in a few words, or raises `RuleBroken` or `NotApplicable`. An extension is what a
    server of the dialect need not offer."""

    name: str
    statement: str
    check: Callable[[Server], str]
    is_extension: bool = False


@dataclass(frozen=True)
class Result:
    """What came of one rule; `detail` says what was looked at, what is wrong, or why it could not be looked at."""

    rule: Rule
    outcome: Outcome
    detail: str
    seconds: float
