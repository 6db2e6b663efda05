"""Answers that end when their client does: whole ones, and server-sent events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..frontend.admission import OverloadedError
from ..frontend.engine_connection import EngineDeadError
from ..frontend.generation_gate import UnavailableError

logger = logging.getLogger(__name__)

T = TypeVar("T")

PIECE_BYTES = 256 << 10


class ClientGoneError(Exception):
    """The client closed its connection before its answer was ready."""


async def wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(
    request: Request, work: Coroutine[Any, Any, T], drop: Callable[[T], None] | None = None
) -> T:
    """The result of `work`, which is cancelled when the client leaves. `drop` gets a result that nobody takes any more.

    Raises:
        ClientGoneError: it left.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(wait_for_disconnect(request.receive))
    is_taken = False
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        is_taken = True
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
        if drop is not None and not is_taken and not working.cancelled() and working.exception() is None:
            drop(working.result())


class EventStream(Response):
    """`data: {json}` events, ended by `data: [DONE]`. Closes its source whatever ends it.

    What the source raises once the stream has begun is told in band, by the event that `refusal` makes of it. `on_end` is
    called in any case, also when the source has never begun; `on_sent` before the end is sent to a client that is there,
    if all went well: what the client asks next may count on it.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[Any],
        refusal: Callable[[Exception], Any],
        *,
        on_end: Callable[[], None] | None = None,
        on_sent: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._refusal = refusal
        self._on_end = on_end
        self._on_sent = on_sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        leaving = asyncio.create_task(wait_for_disconnect(receive))
        writing = asyncio.create_task(self._write(send, leaving))
        try:
            await asyncio.wait((writing, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (writing, leaving):
                task.cancel()
            try:
                results = await asyncio.gather(writing, leaving, return_exceptions=True)
            finally:
                if self._on_end is not None:
                    self._on_end()
        if isinstance(results[0], Exception):
            raise results[0]

    async def _write(self, send: Send, leaving: asyncio.Task[None]) -> None:
        async def put(body: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._events) as events:  # type: ignore[type-var]
            try:
                async for event in events:
                    await put(b"data: " + msgspec.json.encode(event) + b"\n\n")
                if self._on_sent is not None and not leaving.done():
                    self._on_sent()
            except (ValueError, OverloadedError, UnavailableError, EngineDeadError) as error:
                await put(b"data: " + msgspec.json.encode(self._refusal(error)) + b"\n\n")
        await put(b"data: [DONE]\n\n", more=False)


async def only(event: Any) -> AsyncIterator[Any]:
    """A stream of one event."""
    yield event


class PiecewiseResponse(Response):
    """A large body in pieces: the transport moves what it still holds with every send, so it should not hold much.

    `on_sent` is called when all pieces were sent and the client is there.
    """

    def __init__(self, content: bytes, *, on_sent: Callable[[], None] | None = None, **options: Any) -> None:
        super().__init__(content, **options)
        self._on_sent = on_sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for first in range(0, len(self.body), PIECE_BYTES):
            piece = bytes(self.body[first : first + PIECE_BYTES])
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if self._on_sent is not None and not await Request(scope, receive).is_disconnected():
            self._on_sent()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def encode_json(content: Any, *, large: bool, on_sent: Callable[[], None] | None = None) -> Response:
    """A JSON answer; a large one is encoded on a thread and sent in pieces, so that other streams go on. `on_sent` as for a
    `PiecewiseResponse`; a small one has nothing that anybody counts on."""
    if not large:
        return Response(msgspec.json.encode(content), media_type="application/json")
    encoded = await asyncio.to_thread(msgspec.json.encode, content)
    return PiecewiseResponse(encoded, on_sent=on_sent, media_type="application/json")
