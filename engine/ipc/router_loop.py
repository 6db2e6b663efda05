"""The loop of a thread that answers questions on a ROUTER: what comes by the socket, and what other threads have made."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import msgspec
import zmq

from .curve import CurveGuard
from .sockets import Endpoint, open_socket

logger = logging.getLogger(__name__)

RequestT = TypeVar("RequestT")

TICK_MS = 500


class RouterLoop(Generic[RequestT]):
    """`run` serves until the process ends.

    Args:
        on_request: gets who asks, the question, and the frames that follow it. It may `send`.
        on_wake: called after `wake`.
        on_tick: called again and again, at least every half a second.
    """

    def __init__(
        self,
        where: Endpoint,
        request_type: Any,
        *,
        on_request: Callable[[bytes, RequestT, list[bytes]], None],
        on_wake: Callable[[], None],
        on_tick: Callable[[], None] = lambda: None,
    ) -> None:
        self._where = where
        self._decoder: msgspec.msgpack.Decoder[RequestT] = msgspec.msgpack.Decoder(request_type)
        self._on_request = on_request
        self._on_wake = on_wake
        self._on_tick = on_tick
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK)
        # While it runs.
        self._socket: Any = None

    def wake(self) -> None:
        """From any thread."""
        os.eventfd_write(self._wake_fd, 1)

    def send(self, receiver: bytes, reply: msgspec.Struct, frames: Sequence[bytes | memoryview] = ()) -> None:
        """On the loop's thread. To nobody where the receiver is gone."""
        self._socket.send_multipart([receiver, msgspec.msgpack.encode(reply), *frames], copy=not frames)

    def run(self) -> None:
        context = zmq.Context()
        guard = CurveGuard(context, [self._where])
        self._socket = open_socket(context, zmq.ROUTER, self._where, bind=True)
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_fd, zmq.POLLIN)
        try:
            while True:
                events = dict(poller.poll(TICK_MS))
                if self._wake_fd in events:
                    os.eventfd_read(self._wake_fd)
                    self._on_wake()
                if self._socket in events:
                    self._receive()
                self._on_tick()
        finally:
            guard.close()

    def _receive(self) -> None:
        while True:
            try:
                sender, head, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                request = self._decoder.decode(head)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                # Of another version: its questions are answered by nobody, which it notices.
                logger.warning("a message was not understood: %s", error)
                continue
            self._on_request(sender, request, frames)
