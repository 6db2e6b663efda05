"""Death across nodes: every rank holds a TCP connection to rank 0, and who sees one end without a farewell ends, too.

It is the FIFO of `engine/ipc/lifeline.py` between hosts: whatever kills a process closes its connections; a host that is
gone without a word is noticed by TCP (keep-alive, and a limit on what is not acknowledged), within some seconds. It is the
heartbeat between hosts, too: both ends beat, and a node on which everything is stopped is noticed after `timeout_s` of the
other end's own ticks (see `engine/ipc/heartbeat.py`). Only who says the run's token is listened to: clients that connect
and leave unauthenticated end nothing. No data is carried.
"""

from __future__ import annotations

import hmac
import logging
import os
import selectors
import socket
import time
from collections.abc import Callable

from ..engine.ipc.critical_thread import start_critical_thread
from ..engine.ipc.heartbeat import StandstillWatch
from ..engine.ipc.lifeline import EXIT_ORPHANED

logger = logging.getLogger(__name__)

BEAT = b"+"
FAREWELL = b"."
TICK_S = 1.0
# Several beats may have come since the last look.
READ_BYTES = 4096
# Who connects and does not say the token: so many at most, for so many ticks.
MAX_UNAUTHENTICATED = 64
UNAUTHENTICATED_TICKS = 10
CONNECT_TIMEOUT_S = 60.0
# After so many silent seconds the kernel asks, this often, and gives up after so many questions.
KEEPALIVE_IDLE_S = 2
KEEPALIVE_INTERVAL_S = 1
KEEPALIVE_PROBES = 4
# Beats on their way hold those questions back: what is not acknowledged in the same time ends the connection as well.
UNACKNOWLEDGED_S = KEEPALIVE_IDLE_S + KEEPALIVE_PROBES * KEEPALIVE_INTERVAL_S
MILLI = 1000


class NodeLifeline:
    """One rank's end. `on_death` is called before the process ends, in either case by a thread of this class."""

    def __init__(self, token: bytes, on_death: Callable[[], None], timeout_s: float) -> None:
        self._token = token
        self._on_death = on_death
        self._timeout_s = timeout_s
        self._selector = selectors.DefaultSelector()
        # Connections whose peer has said the token, and those of them that have not said farewell: by file descriptor, with
        # the number of beats heard.
        self._members: set[socket.socket] = set()
        self._beats: dict[int, int] = {}
        self._watch = StandstillWatch(int(timeout_s / TICK_S))
        # What the others have said so far, oldest first, and the tick at which they came.
        self._unauthenticated: dict[socket.socket, bytes] = {}
        self._came_at: dict[socket.socket, int] = {}
        self._num_ticks = 0
        self._is_leaving = False

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
        self._is_leaving = True
        for connection in list(self._members):
            send_to(connection, FAREWELL)

    def _start(self) -> None:
        start_critical_thread(self._run, "node lifeline")

    def _run(self) -> None:
        next_tick = time.monotonic()
        while True:
            for key, _ in self._selector.select(max(0.0, next_tick - time.monotonic())):
                assert isinstance(key.fileobj, socket.socket)
                key.data(key.fileobj)
            if time.monotonic() >= next_tick:
                # Not later by what a sleep of the whole machine took.
                next_tick = time.monotonic() + TICK_S
                self._tick()

    def _tick(self) -> None:
        self._num_ticks += 1
        for connection in list(self._members):
            send_to(connection, BEAT)
        if self._watch.tick(self._beats) and not self._is_leaving:
            logger.error("a rank of another node has not run for %g s (heartbeat_timeout_s)", self._timeout_s)
            self._die()
        for connection, came_at in list(self._came_at.items()):
            if self._num_ticks - came_at > UNAUTHENTICATED_TICKS:
                self._drop_unauthenticated(connection)

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError as error:
            # It has left again, or this process may not open more files: nobody's end.
            logger.warning("a connection to the lifeline was not taken: %s", error)
            return
        keep_alive(connection)
        connection.setblocking(False)
        self._unauthenticated[connection] = b""
        self._came_at[connection] = self._num_ticks
        self._selector.register(connection, selectors.EVENT_READ, self._hear_unauthenticated)
        if len(self._unauthenticated) > MAX_UNAUTHENTICATED:
            self._drop_unauthenticated(next(iter(self._came_at)))

    def _drop_unauthenticated(self, connection: socket.socket) -> None:
        self._forget_unauthenticated(connection)
        connection.close()

    def _forget_unauthenticated(self, connection: socket.socket) -> None:
        self._unauthenticated.pop(connection)
        self._came_at.pop(connection)
        self._selector.unregister(connection)

    def _hear_unauthenticated(self, connection: socket.socket) -> None:
        said = self._unauthenticated.get(connection)
        if said is None:
            # Dropped for a later one since it was seen to have something to say.
            return
        part = receive(connection, len(self._token) - len(said))
        said += part
        if part and len(said) < len(self._token):
            self._unauthenticated[connection] = said
            return
        self._forget_unauthenticated(connection)
        if hmac.compare_digest(said, self._token):
            self._add_member(connection)
        else:
            connection.close()

    def _add_member(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._members.add(connection)
        self._beats[connection.fileno()] = 0
        self._selector.register(connection, selectors.EVENT_READ, self._hear_member)

    def _hear_member(self, connection: socket.socket) -> None:
        said = receive(connection, READ_BYTES)
        if FAREWELL in said:
            # It stays open: this process may have to say farewell, too.
            self._selector.unregister(connection)
            del self._beats[connection.fileno()]
        elif said:
            self._beats[connection.fileno()] += len(said)
        else:
            self._selector.unregister(connection)
            del self._beats[connection.fileno()]
            self._die()

    def _die(self) -> None:
        if self._is_leaving:
            # In order, as the others are; a farewell may have been lost with a connection that still carried beats.
            return
        self._on_death()
        os._exit(EXIT_ORPHANED)


def send_to(connection: socket.socket, word: bytes) -> None:
    """To a peer that reads; one that does not, or has left, is noticed otherwise."""
    try:
        connection.send(word)
    except OSError:
        return


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
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_S * MILLI)
