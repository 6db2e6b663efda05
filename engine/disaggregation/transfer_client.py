"""The decode's side of the sockets between engines: asks for what its jobs want, until they have it or it cannot be had.

One thread. A job asks one or more addresses, each with one question at a time. Whoever answers nothing for `SILENCE_S`, not
even a ping, is taken for dead, as is who ends the connection; the jobs that wait for it fail.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import zmq

from ..io_struct import TransferSource
from ..ipc.critical_thread import start_critical_thread
from ..ipc.sockets import CurveKeys, Endpoint, open_socket
from .wire import Answer, Fetch, Hello, Ping, Pong, Refused, Release, Reply, Request, Welcome

logger = logging.getLogger(__name__)

TICK_MS = 500
SILENCE_S = 10.0
NOT_ACCEPTED = "it ends the connection at once: has it another WAYBILL_RUN_SECRET?"


class Job(Protocol):
    """Called on the client's thread, while nobody drops it."""

    @property
    def source(self) -> TransferSource: ...

    @property
    def attempt(self) -> int: ...

    def begin(self, welcome: Welcome) -> dict[str, Fetch]:
        """What to ask first, by address."""
        ...

    def prepare(self, address: str, answer: Answer) -> None:
        """Before `take`, whatever may last: until what is taken is at hand, and can be written. Nobody who drops the job
        waits for that.

        Raises:
            ValueError: it cannot be had; the message says why.
        """
        ...

    def take(self, address: str, answer: Answer, frames: Sequence[memoryview]) -> Fetch | None:
        """What to ask this address next; None: it has given all.

        Raises:
            ValueError: it cannot be had; the message says why.
        """
        ...

    def finish(self, error: str) -> None:
        """Everything has arrived or, with an error, not."""
        ...


class PoolWatch(Protocol):
    """Who keeps something of the engines that answer. Called on the client's thread."""

    @property
    def is_needed(self) -> bool:
        """Whether to ask who is still there also while no job runs."""
        ...

    def held(self, address: str) -> int:
        """The generation of the address's pool that is mapped; 0: none is."""
        ...

    def seen(self, address: str, generation: int) -> None:
        """An address has answered: the generation of its pool."""
        ...

    def lost(self, address: str) -> None:
        """Nobody answers there any more, or somebody else."""
        ...


@dataclass
class _Link:
    """A socket to one address, and one that tells when its connection has ended."""

    socket: Any
    monitor: Any
    heard_at: float
    incarnation: str | None = None


@dataclass
class _Running:
    job: Job
    # Held while the job is called; once it is dropped, it is not any more.
    lock: threading.Lock = field(default_factory=threading.Lock)
    is_dropped: bool = False
    is_greeted: bool = False
    # Where an answer is waited for.
    asked: set[str] = field(default_factory=set)


def bootstrap_address(source: TransferSource) -> str:
    host = f"[{source.host}]" if ":" in source.host else source.host
    return f"tcp://{host}:{source.port}"


class TransferClient:
    """`release_to` says which of a prefill's sockets is told that a request needs nothing more; None: it is told by another
    thread."""

    def __init__(
        self,
        keys: CurveKeys,
        facts: dict[str, str],
        release_to: Callable[[Welcome, TransferSource], str] | None = None,
        watch: PoolWatch | None = None,
    ) -> None:
        self._watch = watch
        self._keys = keys
        self._hello = Hello(facts)
        self._release_to = release_to
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._running: dict[str, _Running] = {}
        # From other threads: jobs to begin, releases to send.
        self._orders: deque[Job | tuple[TransferSource, Release]] = deque()
        self._context: Any = zmq.Context()
        self._poller = zmq.Poller()
        self._links: dict[str, _Link] = {}
        # By bootstrap address.
        self._welcomes: dict[str, Welcome] = {}
        self._last_welcomes: dict[str, Welcome] = {}
        self._decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)

    # --- from any thread --------------------------------------------------------------------------------------------

    def start(self) -> None:
        start_critical_thread(self.run, "transfer client")

    def add(self, job: Job) -> None:
        with self._lock:
            self._running[job.source.key] = _Running(job)
        self._order(job)

    def drop(self, key: str) -> None:
        """The job of this key is not called again, once this returns. Waits for what it is doing, and for no other job."""
        with self._lock:
            running = self._running.pop(key, None)
        if running is not None:
            with running.lock:
                running.is_dropped = True

    def release(self, source: TransferSource, error: str = "") -> None:
        """Tell the prefill's side that the request needs nothing more of it."""
        self._order((source, Release(source.key, error)))

    def _order(self, order: Job | tuple[TransferSource, Release]) -> None:
        self._orders.append(order)
        os.eventfd_write(self._wake_fd, 1)

    # --- the thread -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        self._poller.register(self._wake_fd, zmq.POLLIN)
        ticked_at = 0.0
        while True:
            is_idle = not self._has_to_watch
            events = dict(self._poller.poll(None if is_idle else TICK_MS))
            if is_idle:
                # Nobody was asked for anything.
                for link in self._links.values():
                    link.heard_at = time.monotonic()
            if self._wake_fd in events:
                os.eventfd_read(self._wake_fd)
                self._take_orders()
            for address, link in list(self._links.items()):
                if link.socket in events:
                    self._receive(address, link)
                if link.monitor in events and self._links.get(address) is link:
                    # A question, or its answer, may have been on the way. Another connection is another socket's.
                    was_there = link.incarnation is not None
                    self._lose(address, "the connection has ended" if was_there else NOT_ACCEPTED)
            if self._has_to_watch and time.monotonic() - ticked_at > TICK_MS / 1000:
                ticked_at = time.monotonic()
                self._tick()

    @property
    def _has_to_watch(self) -> bool:
        return bool(self._running) or (self._watch is not None and self._watch.is_needed)

    def _take_orders(self) -> None:
        while self._orders:
            order = self._orders.popleft()
            if isinstance(order, tuple):
                self._send_release(*order)
            else:
                self._begin(order)

    def _send_release(self, source: TransferSource, release: Release) -> None:
        """Also where the connection has ended meanwhile: another one will do, if the engine is the same."""
        welcome = self._last_welcomes.get(bootstrap_address(source))
        if welcome is not None and self._release_to is not None:
            named = msgspec.structs.replace(release, incarnation=welcome.incarnation)
            self._send(self._release_to(welcome, source), named)

    def _begin(self, job: Job) -> None:
        running = self._running.get(job.source.key)
        if running is None or running.job is not job:
            # Dropped meanwhile.
            return
        address = bootstrap_address(job.source)
        welcome = self._welcomes.get(address)
        try:
            if welcome is not None:
                self._ask_first(running, welcome)
            else:
                running.asked.add(address)
                self._send(address, self._hello)
        except zmq.ZMQError as error:
            self._fail(running, f"{address}: {error}")

    def _ask_first(self, running: _Running, welcome: Welcome) -> None:
        first = running.job.begin(welcome)
        running.asked, running.is_greeted = set(first), True
        for address, fetch in first.items():
            self._send(address, fetch)

    def _send(self, address: str, request: Request) -> None:
        link = self._links.get(address)
        if link is None:
            socket = open_socket(self._context, zmq.DEALER, Endpoint(address, self._keys), bind=False)
            link = _Link(socket, socket.get_monitor_socket(zmq.EVENT_DISCONNECTED), time.monotonic())
            self._links[address] = link
            self._poller.register(socket, zmq.POLLIN)
            self._poller.register(link.monitor, zmq.POLLIN)
            # Learn which engine it is.
            socket.send(msgspec.msgpack.encode(Ping()))
        link.socket.send(msgspec.msgpack.encode(request))

    def _receive(self, address: str, link: _Link) -> None:
        while True:
            try:
                head, *frames = link.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            link.heard_at = time.monotonic()
            try:
                reply = self._decoder.decode(head.buffer)
            except msgspec.DecodeError as error:
                self._lose(address, f"its answer was not understood: {error}")
                return
            self._handle(address, link, reply, [frame.buffer for frame in frames])
            if self._links.get(address) is not link:
                return

    def _handle(self, address: str, link: _Link, reply: Reply, frames: list[memoryview]) -> None:
        if isinstance(reply, Pong):
            if link.incarnation not in (None, reply.incarnation):
                self._lose(address, "the prefill's engine has been started anew")
            link.incarnation = reply.incarnation
            self._see(address, reply.pool)
        elif isinstance(reply, (Welcome, Refused)):
            self._on_greeting(address, reply)
        else:
            self._on_answer(address, reply, frames)

    def _see(self, address: str, generation: int) -> None:
        """Who gives memory back waits until nobody has it mapped, so it is told at once."""
        if self._watch is None:
            return
        held = self._watch.held(address)
        self._watch.seen(address, generation)
        if held and not self._watch.held(address) and address in self._links:
            self._send(address, Ping())

    def _on_greeting(self, address: str, reply: Welcome | Refused) -> None:
        if isinstance(reply, Welcome):
            self._welcomes[address] = self._last_welcomes[address] = reply
        for running in list(self._running.values()):
            if bootstrap_address(running.job.source) == address and not running.is_greeted:
                if isinstance(reply, Welcome):
                    self._ask_first(running, reply)
                else:
                    self._fail(running, f"the engines do not go together: {reply.error}")

    def _on_answer(self, address: str, answer: Answer, frames: list[memoryview]) -> None:
        with self._lock:
            running = self._running.get(answer.key)
        if running is None or running.job.attempt != answer.attempt:
            return
        try:
            running.job.prepare(address, answer)
            with running.lock:
                if running.is_dropped:
                    return
                fetch = running.job.take(address, answer, frames)
        except ValueError as refusal:
            self._fail(running, str(refusal))
            return
        if fetch is not None:
            self._send(address, fetch)
        else:
            running.asked.discard(address)
            if not running.asked:
                self._end(running, "")

    def _fail(self, running: _Running, error: str) -> None:
        """Whatever it was, the next job asks anew who is there."""
        self._welcomes.pop(bootstrap_address(running.job.source), None)
        self._end(running, error)

    def _end(self, running: _Running, error: str) -> None:
        with self._lock:
            if self._running.get(running.job.source.key) is not running:
                return
            del self._running[running.job.source.key]
        running.job.finish(error)

    def _tick(self) -> None:
        """See who is still there."""
        now = time.monotonic()
        for address, link in list(self._links.items()):
            if now - link.heard_at > SILENCE_S:
                self._lose(address, f"nothing was heard of it for {SILENCE_S:g} s")
            else:
                self._send(address, Ping(0 if self._watch is None else self._watch.held(address)))

    def _lose(self, address: str, why: str) -> None:
        """Forget a socket, with whatever was learned from the engine behind it."""
        link = self._links.pop(address)
        self._poller.unregister(link.socket)
        self._poller.unregister(link.monitor)
        link.socket.disable_monitor()
        link.socket.close(linger=0)
        if self._watch is not None:
            self._watch.lost(address)
        for where, welcome in list(self._welcomes.items()):
            if address in (where, welcome.routes) or any(address in ranks for ranks in welcome.pages):
                del self._welcomes[where]
        for running in list(self._running.values()):
            if address in running.asked:
                self._fail(running, f"the prefill's side at {address}: {why}")
