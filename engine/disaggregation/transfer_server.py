"""The prefill's side of a socket between engines: takes questions, and answers each when there is something to say.

One thread and one ROUTER. What is to be had stands in `Answers`, which other threads fill; they wake this one by `wake`.
"""

from __future__ import annotations

import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec
import zmq

from ..ipc.critical_thread import start_critical_thread
from ..ipc.curve import CurveGuard
from ..ipc.sockets import Endpoint, open_socket
from .wire import Answer, Ended, Fetch, Hello, Ping, Pong, Refused, Release, Reply, Request, Welcome, difference

logger = logging.getLogger(__name__)

TICK_MS = 500
# Who has a pool mapped says so every half a second. A process that has died has let go of it.
HOLDER_S = 3.0
# Questions that wait for an answer, over all who ask.
MAX_WAITING = 65_536
# Requests of which is remembered why they have ended.
MAX_REMEMBERED = 4096


class Answers(Protocol):
    """What a server has to give. Called on the server's thread."""

    def answer(self, fetch: Fetch) -> tuple[Answer, Sequence[memoryview]] | None:
        """None: there is nothing yet."""
        ...

    def release(self, message: Release) -> None: ...


class Endings:
    """Why requests have ended of which nothing is to be had any more; the last ones alone."""

    def __init__(self) -> None:
        self._errors: OrderedDict[str, str] = OrderedDict()

    def add(self, key: str, error: str) -> None:
        self._errors[key] = error
        if len(self._errors) > MAX_REMEMBERED:
            self._errors.popitem(last=False)

    def forget(self, key: str) -> None:
        self._errors.pop(key, None)

    def get(self, key: str) -> str | None:
        return self._errors.get(key)


class TransferServer:
    """`welcome` and `facts` are for the socket at the bootstrap port. A question that finds no answer within `timeout_s` is
    told so."""

    def __init__(
        self,
        where: Endpoint,
        incarnation: str,
        answers: Answers,
        timeout_s: float,
        *,
        welcome: Welcome | None = None,
        facts: dict[str, str] | None = None,
        pool_generation: Callable[[], int] = lambda: 0,
    ) -> None:
        self._where = where
        self._incarnation = incarnation
        self._answers = answers
        self._timeout_s = timeout_s
        self._welcome = welcome
        self._facts = facts or {}
        self._pool_generation = pool_generation
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
        # By who asks and for what: since when.
        self._waiting: dict[tuple[bytes, str], tuple[Fetch, float]] = {}
        # By who has this rank's pool mapped: when that was last said.
        self._holders: dict[bytes, float] = {}

    def start(self) -> None:
        start_critical_thread(self.run, "transfer server")

    def wake(self) -> None:
        """From any thread: there may be more to give."""
        os.eventfd_write(self._wake_fd, 1)

    def has_holders(self) -> bool:
        """From any thread: whether anybody has this rank's pool mapped, and was there a moment ago."""
        oldest = time.monotonic() - HOLDER_S
        return any(said_at > oldest for said_at in list(self._holders.values()))

    def run(self) -> None:
        context = zmq.Context()
        guard = CurveGuard(context, [self._where])
        socket = open_socket(context, zmq.ROUTER, self._where, bind=True)
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self._wake_fd, zmq.POLLIN)
        try:
            while True:
                events = dict(poller.poll(TICK_MS))
                if self._wake_fd in events:
                    os.eventfd_read(self._wake_fd)
                    self._answer_waiting(socket)
                if socket in events:
                    self._receive(socket)
                self._expire(socket)
        finally:
            guard.close()

    def _receive(self, socket: Any) -> None:
        while True:
            try:
                sender, head, *_ = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                request = self._decoder.decode(head)
            except msgspec.DecodeError as error:
                # Of another version: its questions are answered by nobody, which it notices.
                logger.warning("a message of another engine was not understood: %s", error)
                continue
            self._handle(socket, sender, request)

    def _handle(self, socket: Any, sender: bytes, request: Request) -> None:
        if isinstance(request, Ping):
            self._holders.pop(sender, None)
            if request.pool:
                self._holders[sender] = time.monotonic()
            self._send(socket, sender, Pong(self._incarnation, self._pool_generation()))
        elif isinstance(request, Hello):
            self._send(socket, sender, self._greet(request))
        elif isinstance(request, Release):
            # That of an engine which was here before is of no concern.
            if request.incarnation == self._incarnation:
                self._answers.release(request)
        elif request.incarnation != self._incarnation:
            self._send(socket, sender, Ended(request.key, request.attempt, "the engine has been started anew"))
        elif not self._try(socket, sender, request):
            if len(self._waiting) >= MAX_WAITING:
                self._send(socket, sender, Ended(request.key, request.attempt, "too many questions wait"))
            else:
                self._waiting[sender, request.key] = (request, time.monotonic())

    def _greet(self, hello: Hello) -> Reply:
        if self._welcome is None:
            return Refused("this is not the bootstrap port")
        error = difference(self._facts, hello.facts) if hello.facts else ""
        return Refused(error) if error else self._welcome

    def _try(self, socket: Any, sender: bytes, fetch: Fetch) -> bool:
        answer = self._answers.answer(fetch)
        if answer is None:
            return False
        self._send(socket, sender, *answer)
        return True

    def _answer_waiting(self, socket: Any) -> None:
        for place, (fetch, _) in list(self._waiting.items()):
            if self._try(socket, place[0], fetch):
                del self._waiting[place]

    def _expire(self, socket: Any) -> None:
        for sender, said_at in list(self._holders.items()):
            if said_at < time.monotonic() - HOLDER_S:
                del self._holders[sender]
        oldest = time.monotonic() - self._timeout_s
        for place, (fetch, since) in list(self._waiting.items()):
            if since < oldest:
                del self._waiting[place]
                error = f"the prefill has not come to it within {self._timeout_s:g} s"
                self._send(socket, place[0], Ended(fetch.key, fetch.attempt, error))

    @staticmethod
    def _send(socket: Any, receiver: bytes, reply: Reply, frames: Sequence[memoryview] = ()) -> None:
        """To nobody where the other side is gone."""
        socket.send_multipart([receiver, msgspec.msgpack.encode(reply), *frames], copy=not frames)
