"""Death across nodes: every rank holds a TCP connection to rank 0, and who sees one end without a farewell ends, too.

It is the FIFO of `engine/lifeline.py` between hosts: whatever kills a process closes its connections; a host that is gone
without a word is noticed by TCP's keep-alive, within some seconds. Only who says the run's token is listened to, so that
strangers who connect and leave end nothing. No data is carried.
"""

from __future__ import annotations

import hmac
import os
import selectors
import socket
import threading
from collections.abc import Callable

from ..engine.lifeline import EXIT_ORPHANED

FAREWELL = b"."
CONNECT_TIMEOUT_S = 60.0
# After so many silent seconds the kernel asks, this often, and gives up after so many questions.
KEEPALIVE_IDLE_S = 2
KEEPALIVE_INTERVAL_S = 1
KEEPALIVE_PROBES = 4


class NodeLifeline:
    """One rank's end. `on_death` is called before the process ends, in either case by a thread of this class."""

    def __init__(self, token: bytes, on_death: Callable[[], None]) -> None:
        self._token = token
        self._on_death = on_death
        self._selector = selectors.DefaultSelector()
        # Connections whose peer has said the token, and what the others have said so far.
        self._members: set[socket.socket] = set()
        self._strangers: dict[socket.socket, bytes] = {}

    def serve(self, listener: socket.socket) -> None:
        """Rank 0: take the others in."""
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._start()

    def join(self, host: str, port: int) -> None:
        """Any other rank: hold on to rank 0."""
        connection = socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S)
        keep_alive(connection)
        connection.sendall(self._token)
        self._add_member(connection)
        self._start()

    def farewell(self) -> None:
        """The run is over: what ends from now on ends in order."""
        for connection in list(self._members):
            try:
                connection.send(FAREWELL)
            except OSError:
                # It has left before.
                continue

    def _start(self) -> None:
        threading.Thread(target=self._watch, name="node lifeline", daemon=True).start()

    def _watch(self) -> None:
        while True:
            for key, _ in self._selector.select():
                assert isinstance(key.fileobj, socket.socket)
                key.data(key.fileobj)

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        keep_alive(connection)
        connection.setblocking(False)
        self._strangers[connection] = b""
        self._selector.register(connection, selectors.EVENT_READ, self._hear_stranger)

    def _hear_stranger(self, connection: socket.socket) -> None:
        said = self._strangers.pop(connection)
        part = receive(connection, len(self._token) - len(said))
        said += part
        if part and len(said) < len(self._token):
            self._strangers[connection] = said
            return
        self._selector.unregister(connection)
        if hmac.compare_digest(said, self._token):
            self._add_member(connection)
        else:
            connection.close()

    def _add_member(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._members.add(connection)
        self._selector.register(connection, selectors.EVENT_READ, self._hear_member)

    def _hear_member(self, connection: socket.socket) -> None:
        if receive(connection, 1) == FAREWELL:
            # It stays open: this process may have to say farewell, too.
            self._selector.unregister(connection)
            return
        self._on_death()
        os._exit(EXIT_ORPHANED)


def receive(connection: socket.socket, num_bytes: int) -> bytes:
    """What has arrived; nothing where the connection has ended in any way."""
    try:
        return connection.recv(num_bytes)
    except OSError:
        return b""


def keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
