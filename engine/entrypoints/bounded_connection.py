"""A connection of the HTTP server that also ends when its client takes too long.

uvicorn bounds the time between two requests alone. A head that never ends, the rest of a body whose request was answered
already, and an answer that nobody reads would hold a connection for ever. The body of a running request is `BoundedBody`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import Enum

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from .errors import error_response
from .http_limits import HttpLimits
from .request_guard import OPEN_PATHS

# For a client to take the answer to a request of which it still sends the body, as after 413.
REST_TIMEOUT_S = 5.0
# As h11 says it.
HEAD_TOO_LONG = 431


class Awaited(Enum):
    """What a connection waits for, with a bound on the time."""

    HEAD = "the head of a request"
    NEXT = "the next request"
    REST = "the rest of a body that nobody reads"


class BoundedHeads(h11.Connection):
    """h11 bounds a head that is not complete yet; here also one that comes in one piece."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(h11.SERVER, max_bytes)
        self._max_bytes = max_bytes
        self.is_too_long = False
        # One that was complete.
        self.refused: h11.Request | None = None

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            self.is_too_long = error.error_status_hint == HEAD_TOO_LONG
            raise
        if isinstance(event, h11.Request) and head_bytes(event) > self._max_bytes:
            self.is_too_long, self.refused = True, event
            raise h11.RemoteProtocolError("the head is too long", HEAD_TOO_LONG)
        return event


def head_bytes(request: h11.Request) -> int:
    """As it came, give or take some spaces."""
    return (
        len(request.method)
        + len(request.target)
        + 12
        + sum(len(name) + len(value) + 4 for name, value in request.headers)
    )


class BoundedConnection(H11Protocol):
    """One client's connection. `on_lost` is called once, when it is gone.

    Those beyond `max_connections` are told to come again later, except by load balancers' questions.
    """

    def __init__(
        self,
        config: Config,
        state: ServerState,
        *,
        limits: HttpLimits,
        max_connections: int,
        on_lost: Callable[[], None],
    ) -> None:
        super().__init__(config, state, {})
        self.conn: BoundedHeads = BoundedHeads(limits.max_header_bytes)
        self._limits = limits
        self._max_connections = max_connections
        self._on_lost = on_lost
        self._is_surplus = False
        self._awaited: Awaited | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    # --- from the transport -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._is_surplus = len(self.connections) > self._max_connections
        if self._is_surplus:
            self.app = Surplus(self.app, self._max_connections)  # type: ignore[assignment, arg-type]
        self._await(Awaited.HEAD)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        missing = self._missing()
        if self._is_surplus and missing is Awaited.NEXT:
            self._close()
        else:
            self._await(missing)

    def connection_lost(self, exc: Exception | None) -> None:
        self._await(None)
        self._stop_write_timer()
        super().connection_lost(exc)
        # Also where the transport has closed by itself.
        self._unset_keepalive_if_required()
        self._on_lost()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_write_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_timer()

    # --- from uvicorn -----------------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            # What the client has not taken yet keeps the socket open.
            self._await(None)
            self._start_write_timer()
        elif self._missing() is Awaited.REST:
            self._await(Awaited.REST)
        elif self._is_surplus:
            self._close()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._start_write_timer()

    def send_400_response(self, msg: str) -> None:
        """The client broke the protocol. Whatever it sends from here on belongs to no request."""
        if self.conn.is_too_long:
            msg = f"The head of a request may have {self._limits.max_header_bytes} bytes (--max-header-bytes)."
        self._refuse(msg, 400)

    # --- bounds -----------------------------------------------------------------------------------------------------

    def _missing(self) -> Awaited | None:
        """What the client owes, by the state of the protocol."""
        if self.transport.is_closing():
            return None
        if self.conn.their_state is h11.IDLE:
            return Awaited.HEAD if self.conn.trailing_data[0] else Awaited.NEXT
        if self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE:
            return Awaited.REST
        return None

    def _await(self, awaited: Awaited | None) -> None:
        """Start the clock for something else; it goes on for the same."""
        if awaited is self._awaited:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._awaited = awaited
        self._timer = None
        if awaited is not None:
            seconds = {
                Awaited.HEAD: self._limits.header_timeout_s,
                Awaited.NEXT: self._limits.keep_alive_timeout_s,
                Awaited.REST: REST_TIMEOUT_S,
            }[awaited]
            self._timer = self.loop.call_later(seconds, self._expire, awaited)

    def _expire(self, awaited: Awaited) -> None:
        if awaited is Awaited.HEAD and self.conn.trailing_data[0]:
            seconds = self._limits.header_timeout_s
            self._refuse(f"the head of the request did not arrive within {seconds} s (--header-timeout)", 408)
        else:
            self._close()

    def _refuse(self, message: str, status: int) -> None:
        """Answer without a handler, unless one has begun to, and close."""
        state = self.conn.our_state
        if state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            response = error_response(message, status, close=True)
            headers = [*self.server_state.default_headers, *response.raw_headers]
            refused = self.conn.refused
            if refused is not None:
                has_body = refused.method != b"HEAD"
            else:
                has_body = state is h11.IDLE or self.scope["method"] != "HEAD"
            events: list[h11.Event] = [h11.Response(status_code=status, headers=headers)]
            events += [h11.Data(data=bytes(response.body))] if has_body else []
            for event in (*events, h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:
            # To its handler the client has gone.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._close()

    def _close(self) -> None:
        self._await(None)
        self.transport.close()
        self._start_write_timer()

    def _start_write_timer(self) -> None:
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self._limits.write_timeout_s, self.transport.abort)

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


class Surplus:
    """The application as a connection beyond the bound sees it."""

    def __init__(self, app: ASGIApp, max_connections: int) -> None:
        self._app = app
        self._max_connections = max_connections

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        message = f"more than {self._max_connections} connections (--max-connections); try again later"
        await error_response(message, 503)(scope, receive, send)
