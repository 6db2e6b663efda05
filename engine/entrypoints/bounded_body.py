"""A request's body as it arrives, within bounds: its size, its time, and the bytes of all bodies that are held at once."""

from __future__ import annotations

import asyncio

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message, Receive, Scope

from .http_limits import HttpLimits

# Under which a request's scope carries its body.
SCOPE_KEY = "waybill.body"


class BodyBudget:
    """Bytes of bodies that the process may hold at once, over all connections."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.held_bytes = 0

    def take(self, num_bytes: int) -> bool:
        """Whether there is room for so many more; if so they are held."""
        if self.held_bytes + num_bytes > self._max_bytes:
            return False
        self.held_bytes += num_bytes
        return True

    def give_back(self, num_bytes: int) -> None:
        self.held_bytes -= num_bytes
        assert self.held_bytes >= 0


class BoundedBody:
    """The `receive` of one request.

    Bytes count as they arrive, not as they are announced: a client that announces much and sends nothing takes nothing
    from others. They count until `release`.

    Raises, where a handler receives (FastAPI answers with an `HTTPException`, and takes any other exception for a body that
    it cannot parse):
        HTTPException: 413, the body is too large; 408, it took too long; 503, there is no room for it now.
    """

    def __init__(self, receive: Receive, limits: HttpLimits, budget: BodyBudget) -> None:
        self._receive = receive
        self._limits = limits
        self._budget = budget
        self._deadline = asyncio.get_running_loop().time() + limits.body_timeout_s
        self._received_bytes = self._held_bytes = 0
        self._is_whole = False

    async def __call__(self) -> Message:
        if self._is_whole:
            # What comes next is the client's leave, for which nobody sets a time.
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                event = await self._receive()
        except TimeoutError:
            message = f"the body did not arrive within {self._limits.body_timeout_s} s (--body-timeout)"
            raise HTTPException(408, message, {"Connection": "close"}) from None
        if event["type"] == "http.request":
            self._is_whole = not event.get("more_body", False)
            self._hold(len(event.get("body", b"")))
        return event

    def _hold(self, num_bytes: int) -> None:
        self._received_bytes += num_bytes
        if self._received_bytes > self._limits.max_body_bytes:
            raise HTTPException(413, too_large(self._limits))
        if not self._budget.take(num_bytes):
            raise HTTPException(
                503, "too many bytes of bodies are on their way (--max-inflight-body-bytes); try again later"
            )
        self._held_bytes += num_bytes

    def release(self) -> None:
        """The bytes are parsed and dropped, or the request is over."""
        self._budget.give_back(self._held_bytes)
        self._held_bytes = 0


def too_large(limits: HttpLimits) -> str:
    return f"the body is too large: must be at most {limits.max_body_bytes} bytes (--max-body-bytes)"


def attach(scope: Scope, body: BoundedBody) -> None:
    scope[SCOPE_KEY] = body


def release_body(request: Request) -> None:
    """To be called by whoever has parsed a body and holds its bytes no longer; else they count until the request ends."""
    body: BoundedBody | None = request.scope.get(SCOPE_KEY)
    if body is not None:
        body.release()
