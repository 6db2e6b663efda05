"""A request on its way through the router, and its answer, piece by piece."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..engine.entrypoints.bounded_body import release_body
from ..engine.entrypoints.errors import error_response
from ..engine.entrypoints.responses import wait_for_disconnect
from .router_sides import PREFILL, Side, Sides, said

logger = logging.getLogger(__name__)

# Said for one hop, or made anew here.
HOP_HEADERS = frozenset(
    (
        *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te"),
        *(b"trailer", b"transfer-encoding", b"upgrade", b"host", b"expect", b"date", b"server"),
    )
)
RawHeaders = list[tuple[bytes, bytes]]
# Of the prefill's side, when the decode's has answered.
LAST_ANSWER_S = 1.0


def passed_on(headers: Iterable[tuple[bytes, bytes]]) -> RawHeaders:
    """Those that are for the other end, repeated ones as they came."""
    found = [(name.lower(), value) for name, value in headers]
    named = {
        name.strip().lower() for key, value in found if key == b"connection" for name in value.split(b",")
    } | HOP_HEADERS
    return [(name, value) for name, value in found if name not in named]


def to_side(http: Request, side: Side, content: bytes) -> httpx.Request:
    """The caller's request with another body. The client adds nothing of its own: no header, no cookie of somebody else's
    answer."""
    headers = [(name, value) for name, value in passed_on(http.headers.raw) if name != b"content-length"]
    query: bytes = http.scope["query_string"]
    path: bytes = http.scope["raw_path"] + (b"?" + query if query else b"")
    base = httpx.URL(side.url)
    url = base.copy_with(raw_path=base.raw_path.rstrip(b"/") + path)
    return httpx.Request(http.method, url, headers=headers, content=content or None)


@dataclass(frozen=True)
class Beginning:
    """An answer as far as it has come."""

    answer: httpx.Response
    first: bytes
    rest: AsyncIterator[bytes]

    @property
    def is_refusal(self) -> bool:
        """Of a stream the first event says it, in the words of either API: what is refused with 400 is an event of it."""
        if self.answer.is_error:
            return True
        try:
            event = msgspec.json.decode(self.first.removeprefix(b"data: ").partition(b"\n\n")[0], type=FirstEvent)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return False
        return event.error is not None or (event.meta_info.get("finish_reason") or {}).get("status_code") is not None


class FirstEvent(msgspec.Struct):
    """What of it says that there is no answer."""

    error: Any = None
    meta_info: dict[str, Any] = {}


# The sides that are asked at once, each with its body. The last one's answer is the caller's.
Attempt = dict[Side, bytes]


class FailedError(Exception):
    """An attempt has brought no answer; `response` is what the caller is told if it was the last one."""

    def __init__(self, response: Response, *, may_try_again: bool = True) -> None:
        super().__init__()
        self.response = response
        self.may_try_again = may_try_again


class Relay(Response):
    """The answer to a request, of the first attempt that brings one. When it ends, or its caller leaves, so do those of the
    sides: what still runs there is aborted.

    An attempt fails where nobody takes the connection, or with a status in `elsewhere`.
    """

    def __init__(
        self, sides: Sides, http: Request, attempts: Iterator[Attempt], elsewhere: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self._sides = sides
        self._http = http
        self._attempts = attempts
        self._elsewhere = elsewhere
        self._has_begun = False
        # What lets go of the sides' answers.
        self._ending: list[asyncio.Task[None]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        working = self._sides.working(self._relay(scope, receive, send))
        leaving = asyncio.create_task(wait_for_disconnect(receive))
        try:
            await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
            is_stopped = working.cancelled()
        finally:
            for task in (working, leaving):
                task.cancel()
            results = await asyncio.gather(working, leaving, return_exceptions=True)
            # Not in the task that is cancelled when the answer is complete, for the server says then that its caller is
            # gone: a connection that is cancelled while it closes stays open, and its side goes on.
            await asyncio.gather(*self._ending)
        if isinstance(results[0], Exception):
            raise results[0]
        if is_stopped and not self._has_begun:
            await error_response("the router has been stopped (--shutdown-timeout)", 503)(scope, receive, send)

    async def _relay(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = Response()
        for attempt in self._attempts:
            try:
                await self._try(attempt, send)
                return
            except FailedError as failure:
                response = failure.response
                if not failure.may_try_again:
                    break
        self._has_begun = True
        await response(scope, receive, send)

    async def _try(self, attempt: Attempt, send: Send) -> None:
        """
        Raises:
            FailedError: nothing was sent to the caller.
        """
        *_, last = attempt
        asked = {side: asyncio.create_task(self._ask(side, content)) for side, content in attempt.items()}
        patience_s = 0.0
        with last.serving():
            try:
                await asyncio.wait(asked.values(), return_when=asyncio.FIRST_COMPLETED)
                side = next((side for side, asking in asked.items() if has_failed(asking)), last)
                begun = await self._begun(side, asked[side])
                release_body(self._http)
                self._has_begun = True
                try:
                    await send_pieces(begun, send)
                    # The prefill's side comes to its end, too; cut off, its part would count as failed.
                    patience_s = LAST_ANSWER_S if side is last else 0.0
                except httpx.HTTPError as error:
                    # The server cuts the connection, as it does for a response without an end.
                    logger.warning("%s ended in the middle of an answer: %s", side, said(error))
            finally:
                self._ending += [asyncio.create_task(end(asking, patience_s)) for asking in asked.values()]

    async def _ask(self, side: Side, content: bytes) -> Beginning:
        request = to_side(self._http, side, content)
        if side.kind != PREFILL:
            return await begin(self._sides.client, side, request)
        with side.serving():
            return await begin(self._sides.client, side, request)

    async def _begun(self, side: Side, asking: asyncio.Task[Beginning]) -> Beginning:
        try:
            begun = await asking
        except httpx.HTTPError as error:
            side.num_failures += 1
            may_try_again = isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))
            if may_try_again:
                side.found(f"cannot be reached: {said(error)}")
            what = "cannot be reached" if may_try_again else "has ended before its answer"
            response = error_response(f"{side} {what}: {said(error)}", 503)
            raise FailedError(response, may_try_again=may_try_again) from None
        if begun.answer.status_code in self._elsewhere:
            content = begun.first + b"".join([piece async for piece in begun.rest])
            response = Response(content, begun.answer.status_code)
            response.raw_headers = passed_on(begun.answer.headers.raw)
            raise FailedError(response)
        return begun


async def begin(client: httpx.AsyncClient, side: Side, request: httpx.Request) -> Beginning:
    """A decode's side begins a stream before it knows whether there will be a prompt; so its first piece is waited for.
    A prefill's answer is read to its end, for whoever is next on its connection; only an error is of use, and kept."""
    answer = await client.send(request, stream=True)
    pieces = answer.aiter_raw()
    try:
        first = await anext(pieces, b"")
        if side.kind == PREFILL:
            is_kept = Beginning(answer, first, pieces).is_refusal
            kept = [piece async for piece in pieces if is_kept]
            first = b"".join((first, *kept))
    except BaseException:
        await answer.aclose()
        raise
    return Beginning(answer, first, pieces)


async def send_pieces(begun: Beginning, send: Send) -> None:
    headers = passed_on(begun.answer.headers.raw)
    await send({"type": "http.response.start", "status": begun.answer.status_code, "headers": headers})
    if begun.first:
        await send({"type": "http.response.body", "body": begun.first, "more_body": True})
    async for piece in begun.rest:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def has_failed(asking: asyncio.Task[Any]) -> bool:
    return asking.done() and (asking.exception() is not None or asking.result().is_refusal)


async def end(asking: asyncio.Task[Beginning], patience_s: float) -> None:
    """Let go of a side's answer."""
    await asyncio.wait((asking,), timeout=patience_s)
    asking.cancel()
    try:
        begun = await asking
    except (asyncio.CancelledError, httpx.HTTPError):
        return
    await begun.answer.aclose()
