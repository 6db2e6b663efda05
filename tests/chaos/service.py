"""What a trial asks of a service, whether an HTTP server or a program with an `Engine`."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .run_place import RunPlace

# Small, so that trials are short; the default is longer.
HEARTBEAT_S = 5.0
WEIGHT_SYNC_S = 3.0
START_BOUND_S = 90.0


class RefusedError(Exception):
    """The service answered with an error: it lives."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message[:300]}")
        self.status = status


class GoneError(Exception):
    """The connection ended, or the engine says that it is dead."""


@dataclass(frozen=True)
class Answer:
    output: list[int]
    # None without routing, and where an aborted request has none.
    rows: np.ndarray | None
    finish_reason: dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """How a service is laid out."""

    kind: str  # "server" or "engine"
    dp: int
    routing: bool

    def __str__(self) -> str:
        layout = "dp 2" if self.dp == 2 else "tp 2"
        return f"{self.kind}, {layout}{'' if self.routing else ', no routing'}"

    @property
    def tp(self) -> int:
        return 2 // self.dp

    @property
    def roles(self) -> tuple[str, ...]:
        front = "frontend" if self.kind == "server" else "caller"
        return ("agent", "rank 0", "rank 1", "output processor", front)


class Service(Protocol):
    """A running service. Every call raises `RefusedError` or `GoneError`."""

    shape: Shape
    place: RunPlace

    async def wait_until_ready(self) -> None: ...

    async def generate(self, request: dict[str, Any]) -> Answer: ...

    async def stream(
        self, request: dict[str, Any], *, first: asyncio.Event | None = None, leave_after: int | None = None
    ) -> Answer:
        """The last chunk; `first` is set with the first one. Leaves after so many chunks, without an abort."""

    async def control(self, name: str, **arguments: Any) -> None: ...

    async def info(self) -> dict[str, Any]: ...

    async def abort(self, rid: str) -> None: ...

    def tell_to_stop(self) -> None:
        """As its operator would; does not wait."""

    async def wait_for_exit(self, timeout_s: float) -> int:
        """The exit status of what was started.

        Raises:
            TimeoutError: it still runs.
        """

    def last_words(self) -> str:
        """The end of its log."""
