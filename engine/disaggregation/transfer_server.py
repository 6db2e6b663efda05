"""The prefill's side of a socket between engines: takes questions, and answers each when there is something to say.

One thread and one ROUTER. What is to be had stands in `Answers`, which other threads fill; they wake this one by `wake`.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

from ..ipc.critical_thread import start_critical_thread
from ..ipc.router_loop import RouterLoop
from ..ipc.sockets import Endpoint
from .wire import Answer, Ended, Fetch, Hello, Ping, Pong, Refused, Release, Reply, Request, Welcome, difference

# Who has a pool mapped says so every half a second. A process that has died has let go of it.
HOLDER_S = 3.0
# Questions that wait for an answer, over all who ask.
MAX_WAITING = 65_536
# Requests of which is remembered why they have ended.
MAX_REMEMBERED = 4096
LET_GO = "the prefill's side has let go of it"


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
        self._loop: RouterLoop[Request] = RouterLoop(
            where, Request, on_request=self._handle, on_wake=self._answer_waiting, on_tick=self._expire
        )
        self._incarnation = incarnation
        self._answers = answers
        self._timeout_s = timeout_s
        self._welcome = welcome
        self._facts = facts or {}
        self._pool_generation = pool_generation
        # By who asks and for what: since when.
        self._waiting: dict[tuple[bytes, str], tuple[Fetch, float]] = {}
        # By who has this rank's pool mapped: when that was last said.
        self._holders: dict[bytes, float] = {}

    def start(self) -> None:
        start_critical_thread(self._loop.run, "transfer server")

    def wake(self) -> None:
        """From any thread: there may be more to give."""
        self._loop.wake()

    def has_holders(self) -> bool:
        """From any thread: whether anybody has this rank's pool mapped, and was there a moment ago."""
        oldest = time.monotonic() - HOLDER_S
        return any(said_at > oldest for said_at in list(self._holders.values()))

    def _handle(self, sender: bytes, request: Request, _: list[bytes]) -> None:
        if isinstance(request, Ping):
            self._holders.pop(sender, None)
            if request.pool:
                self._holders[sender] = time.monotonic()
            self._loop.send(sender, Pong(self._incarnation, self._pool_generation()))
        elif isinstance(request, Hello):
            self._loop.send(sender, self._greet(request))
        elif isinstance(request, Release):
            # That of an engine which was here before is of no concern.
            if request.incarnation == self._incarnation:
                self._answers.release(request)
        elif request.incarnation != self._incarnation:
            self._loop.send(sender, Ended(request.key, request.attempt, "the engine has been started anew"))
        elif not self._try(sender, request):
            if len(self._waiting) >= MAX_WAITING:
                self._loop.send(sender, Ended(request.key, request.attempt, "too many questions wait"))
            else:
                self._waiting[sender, request.key] = (request, time.monotonic())

    def _greet(self, hello: Hello) -> Reply:
        if self._welcome is None:
            return Refused("this is not the bootstrap port")
        error = difference(self._facts, hello.facts) if hello.facts else ""
        return Refused(error) if error else self._welcome

    def _try(self, sender: bytes, fetch: Fetch) -> bool:
        answer = self._answers.answer(fetch)
        if answer is None:
            return False
        self._loop.send(sender, *answer)
        return True

    def _answer_waiting(self) -> None:
        for place, (fetch, _) in list(self._waiting.items()):
            if self._try(place[0], fetch):
                del self._waiting[place]

    def _expire(self) -> None:
        for sender, said_at in list(self._holders.items()):
            if said_at < time.monotonic() - HOLDER_S:
                del self._holders[sender]
        oldest = time.monotonic() - self._timeout_s
        for place, (fetch, since) in list(self._waiting.items()):
            if since < oldest:
                del self._waiting[place]
                error = f"the prefill has not come to it within {self._timeout_s:g} s"
                self._loop.send(place[0], Ended(fetch.key, fetch.attempt, error))
