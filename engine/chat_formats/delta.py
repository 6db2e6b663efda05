"""What readers of an answer find."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class ToolCall:
    """A call as it was read: `arguments` are JSON of an object."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


@dataclass(frozen=True)
class Delta:
    """What is new of an answer: one of the three."""

    content: str = ""
    reasoning: str = ""
    call: ToolCall | None = None


class Reader(Protocol):
    """Of one answer."""

    def push(self, text: str) -> list[Delta]:
        """What the next piece of its text settles."""

    def close(self) -> list[Delta]:
        """The rest."""


def call_of(name: Any, arguments: Any) -> ToolCall | None:
    """None where these are no name and no arguments."""
    if not isinstance(name, str) or not name:
        return None
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if arguments is None:
        arguments = {}
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


def held_back(text: str, markers: Iterable[str]) -> int:
    """Characters at the end of a text that may be the beginning of a marker."""
    longest = 0
    for marker in markers:
        for length in range(min(len(marker) - 1, len(text)), longest, -1):
            if marker.startswith(text[-length:]):
                longest = length
                break
    return longest


def found_first(text: str, markers: Iterable[str]) -> tuple[int, str]:
    """Where the first of the markers stands, and which; -1 if there is none."""
    places = [(place, -len(marker), marker) for marker in markers if (place := text.find(marker)) >= 0]
    if not places:
        return -1, ""
    place, _, marker = min(places)
    return place, marker
