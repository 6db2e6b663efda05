"""How a check ends that does not pass, and the comparisons that all checks share."""

from __future__ import annotations

import numpy as np

from .answer import Answer


class RuleBroken(Exception):
    """The server does not keep the rule; the message says where."""


class NotApplicable(Exception):
    """The rule cannot be looked at on this server; the message says why. It has not passed."""


class CannotRun(Exception):
    """Nothing can be looked at: no server, no key, no routes."""


def require(condition: bool, message: str) -> None:
    """
    Raises:
        RuleBroken: the condition does not hold.
    """
    if not condition:
        raise RuleBroken(message)


def require_same_rows(what: str, found: np.ndarray, expected: np.ndarray, first: int = 0) -> None:
    """Rows [R, W] of the positions from `first` on are equal.

    Raises:
        RuleBroken: their number differs, or one of them.
    """
    if len(found) != len(expected):
        raise RuleBroken(f"{what}: {len(found)} rows, expected {len(expected)}")
    different = np.flatnonzero((found != expected).any(axis=1))
    if len(different):
        raise RuleBroken(f"{what}: {len(different)} of {len(found)} rows differ, first position {first + different[0]}")


def require_comparable(*answers: Answer) -> None:
    """Answers to one prompt whose tokens differ say nothing about their rows.

    Raises:
        NotApplicable: the tokens differ, although the choice is greedy.
    """
    if any(answer.output_ids != answers[0].output_ids for answer in answers):
        raise NotApplicable("the server samples other tokens for the same prompt at temperature 0")
