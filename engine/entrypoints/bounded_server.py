"""uvicorn on one listening socket, with bounds on connections: see `Acceptor` and `BoundedConnection`."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from .acceptor import Acceptor, Released
from .bounded_connection import BoundedConnection
from .http_limits import HttpLimits

# Connections beyond the bound, which are told so.
SPARE_CONNECTIONS = 32


class BoundedServer(uvicorn.Server):
    """Serves from `serve()` on, until `should_exit`. Signals belong to the caller."""

    def __init__(
        self,
        app: ASGIApp,
        listener: socket.socket,
        limits: HttpLimits,
        *,
        max_connections: int,
        shutdown_timeout_s: float,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                # The one implementation that is always there, and that `BoundedConnection` extends.
                http="h11",
                ws="none",
                log_config=None,
                access_log=False,
                h11_max_incomplete_event_size=limits.max_header_bytes,
                timeout_keep_alive=limits.keep_alive_timeout_s,  # type: ignore[arg-type]
                timeout_graceful_shutdown=math.ceil(shutdown_timeout_s),
            )
        )
        self._listener = listener
        self._limits = limits
        self._max_connections = max_connections
        self._accepting: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """The socket is served by an `Acceptor`; uvicorn itself listens on none."""
        assert sockets is None
        await super().startup(sockets=[])
        acceptor = Acceptor(self._listener, self._connection, self._max_connections + SPARE_CONNECTIONS)
        self._accepting = asyncio.create_task(acceptor.run(), name="accept")

    def _connection(self, on_lost: Released) -> BoundedConnection:
        return BoundedConnection(
            self.config,
            self.server_state,
            limits=self._limits,
            max_connections=self._max_connections,
            on_lost=on_lost,
        )

    async def on_tick(self, counter: int) -> bool:
        """
        Raises:
            OSError: no connection can be taken any more.
        """
        assert self._accepting is not None
        if self._accepting.done():
            self._accepting.result()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """No new connection; what runs comes to its end."""
        assert self._accepting is not None
        self._accepting.cancel()
        await asyncio.wait((self._accepting,))
        self._listener.close()
        await super().shutdown()
