"""A rank of a decode's side: fetches what it holds of a prompt, and writes it to the pages that its leader has reserved."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..io_struct import FirstToken, TransferSource
from ..ipc.frontend_messages import TransferNotice
from ..plan import DropPages, FetchPages, PageMessage
from .head_plan import HeadSlice, head_slices
from .page_copy import PageCopy, byte_counters
from .remote_pools import RemotePools
from .transfer_client import TransferClient
from .wire import CARRIERS, Answer, Ended, Fetch, FetchPositions, PoolPlace, PoolPositions, Positions, Welcome


@dataclass(frozen=True)
class RankShape:
    """Which rank of a decode's side this is, and how many kv heads the model has; 0 where there are latents."""

    tp_rank: int
    tp_size: int
    num_kv_heads: int


def page_address(welcome: Welcome, source: TransferSource) -> list[str]:
    """The ranks that have the request's pages: its room says which dp rank, on both sides alike."""
    return welcome.pages[source.room % len(welcome.pages)]


class Counts:
    """Of what has arrived, by one thread; read by others."""

    def __init__(self) -> None:
        self.num_bytes = dict.fromkeys(CARRIERS, 0)
        self.seconds = 0.0
        self.copy_seconds = 0.0


class PageJob:
    """A prompt's positions on their way to this rank's pool. Steps in flight may still write to its pages, for a request
    that has ended meanwhile."""

    def __init__(
        self,
        message: FetchPages,
        shape: RankShape,
        copy: PageCopy,
        pools: RemotePools,
        counts: Counts,
        notify: Callable[[TransferNotice], None],
    ) -> None:
        self._message = message
        self._shape = shape
        self._copy = copy
        self._wait_for_steps: Callable[[], None] | None = copy.mark()
        self._pools = pools
        self._leases: dict[str, int] = {}
        self._counts = counts
        self._notify = notify
        self._pages = np.frombuffer(message.pages, dtype="<i4")
        self._slices: dict[str, HeadSlice] = {}
        self._incarnation = ""
        # By address: the first position that is still missing.
        self._next: dict[str, int] = {}
        self._first: FirstToken | None = None
        self._began = time.monotonic()

    @property
    def source(self) -> TransferSource:
        return self._message.source

    @property
    def attempt(self) -> int:
        return self._message.attempt

    def begin(self, welcome: Welcome) -> dict[str, Fetch]:
        addresses, shape = page_address(welcome, self.source), self._shape
        slices = head_slices(shape.num_kv_heads, len(addresses), shape.tp_size, shape.tp_rank)
        self._slices = {addresses[one.rank]: one for one in slices}
        self._incarnation = welcome.incarnation
        return {address: self._fetch(address, self._message.start) for address in self._slices}

    def _fetch(self, address: str, start: int) -> Fetch:
        message, heads = self._message, self._slices[address].theirs
        return FetchPositions(
            self._incarnation,
            self.source.key,
            message.attempt,
            start,
            message.end,
            heads,
            lease=self._leases.get(address, 0),
            transport=self._pools.transport(address),
            pool=self._pools.held(address),
        )

    def prepare(self, address: str, answer: Answer) -> None:
        if isinstance(answer, PoolPlace):
            # It is the answer to the first question, or to one that came when the pool had moved.
            self._pools.open(address, answer)
        elif not isinstance(answer, Ended):
            self._check(address, answer)
        if isinstance(answer, PoolPositions):
            began, pages = time.monotonic(), np.frombuffer(answer.pages, dtype="<i4")
            self._pools.read(address, pages, answer.start, answer.end, self._slices[address].theirs)
            self._counts.copy_seconds += time.monotonic() - began
        if self._wait_for_steps is not None:
            self._wait_for_steps()
            self._wait_for_steps = None

    def _check(self, address: str, answer: Answer) -> None:
        """
        Raises:
            ValueError: it is not the next part.
        """
        start = self._start(address)
        if not isinstance(answer, (Positions, PoolPositions)) or answer.start != start:
            raise ValueError("something else than was asked for has arrived")
        if not start < answer.end <= self._message.end:
            raise ValueError(f"positions {start} .. {answer.end} have arrived")

    def _start(self, address: str) -> int:
        return self._next.get(address, self._message.start)

    def take(self, address: str, answer: Answer, frames: Sequence[memoryview]) -> Fetch | None:
        if isinstance(answer, Ended):
            if answer.error:
                raise ValueError(answer.error)
            self._first = answer.first if self._slices[address].rank == 0 else self._first
            return None
        if isinstance(answer, PoolPlace):
            return self._fetch(address, self._start(address))
        assert isinstance(answer, (Positions, PoolPositions)), "see `prepare`"
        start, heads, carrier = answer.start, self._slices[address], "tcp"
        began = time.monotonic()
        if isinstance(answer, PoolPositions):
            pool, their_pages = self._pools.get(address), np.frombuffer(answer.pages, dtype="<i4")
            num_bytes = pool.copy(their_pages, self._pages, start, answer.end, heads.theirs, heads.ours)
            carrier = self._pools.transport(address)
        else:
            self._pools.check_bytes()
            if len(frames) != 1:
                raise ValueError("something else than was asked for has arrived")
            self._copy.scatter(self._pages, start, answer.end, heads.ours, frames[0])
            num_bytes = frames[0].nbytes
        self._counts.copy_seconds += time.monotonic() - began
        self._counts.num_bytes[carrier] += num_bytes
        self._next[address], self._leases[address] = answer.end, answer.lease
        return self._fetch(address, answer.end)

    def finish(self, error: str) -> None:
        self._counts.seconds += time.monotonic() - self._began
        part = f"pages{self._shape.tp_rank}"
        self._notify(TransferNotice(self.source.key, part, self.attempt, error, self._first))


class FetchedPrompts:
    """`PageTransfers` of a decode's rank. The leader's also tells the prefill's side when a request needs no more."""

    def __init__(
        self,
        client: TransferClient,
        shape: RankShape,
        copy: PageCopy,
        pools: RemotePools,
        notify: Callable[[TransferNotice], None],
    ) -> None:
        self._client = client
        self._shape = shape
        self._copy = copy
        self._pools = pools
        self._notify = notify
        self._counts = Counts()
        self._sources: dict[str, TransferSource] = {}

    def handle(self, message: PageMessage) -> None:
        if isinstance(message, FetchPages):
            self._sources[message.source.key] = message.source
            self._client.add(PageJob(message, self._shape, self._copy, self._pools, self._counts, self._notify))
        else:
            assert isinstance(message, DropPages), "this side shares nothing"
            self._client.drop(message.key)
            source = self._sources.pop(message.key, None)
            if source is not None and self._shape.tp_rank == 0 and not message.again:
                self._client.release(source, message.error)

    def counters(self) -> dict[str, int | float]:
        counts = self._counts
        return {
            **byte_counters(counts.num_bytes),
            "transfer_seconds": counts.seconds,
            "transfer_copy_seconds": counts.copy_seconds,
        }
