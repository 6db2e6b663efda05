"""The HTTP server over an application of the test's, on a thread, and clients that speak to it byte by byte."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI

from waybill.engine.entrypoints.bounded_server import BoundedServer
from waybill.engine.entrypoints.http_limits import HttpLimits

PATIENCE_S = 20.0


class HttpService:
    """`url` and `address` of an application that is served; `app` is it."""

    def __init__(self, app: FastAPI, limits: HttpLimits, max_connections: int = 100) -> None:
        self.app = app
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.address = self.listener.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        self.server = BoundedServer(app, self.listener, limits, max_connections=max_connections, shutdown_timeout_s=1.0)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve()), daemon=True)
        self.thread.start()

    @property
    def num_open(self) -> int:
        return len(self.server.server_state.connections)

    def connect(self, data: bytes = b"") -> socket.socket:
        client = socket.create_connection(self.address, timeout=PATIENCE_S)
        client.sendall(data)
        return client

    def ask(self, data: bytes) -> bytes:
        """All that is answered, until the server closes."""
        with self.connect(data) as client:
            return read_to_end(client)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()


@contextmanager
def served(app: FastAPI, max_connections: int = 100, **limits: Any) -> Iterator[HttpService]:
    service = HttpService(app, HttpLimits(**limits), max_connections)
    try:
        yield service
    finally:
        service.stop()


def read_to_end(client: socket.socket) -> bytes:
    """Until the other side closes; a reset counts as that."""
    received = bytearray()
    try:
        while piece := client.recv(1 << 16):
            received += piece
    except ConnectionResetError:
        pass
    return bytes(received)


def statuses(answers: bytes) -> list[int]:
    """Of every response in a stream of bytes, informational ones aside."""
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d\d\d) ", answers) if code[:1] != b"1"]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"it did not happen: {what}"
        time.sleep(0.01)
