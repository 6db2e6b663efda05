"""Requests of one replica by state: waiting in order of priority and arrival, or running on a row of the pool."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from .req import Req


class RequestQueues:
    """All requests that have not finished. Rows `0 .. max_running - 1` are handed to those that run."""

    def __init__(self, max_running: int) -> None:
        self.running: list[Req] = []
        self._waiting: list[Req] = []
        self._by_rid: dict[str, Req] = {}
        self._free_rows = list(range(max_running - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._by_rid)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_compiling(self) -> bool:
        """Whether somebody waits for a grammar."""
        return any(req.is_compiling for req in self._waiting)

    def add(self, req: Req) -> None:
        assert req.rid not in self._by_rid, f"rid {req.rid} is in use"
        self._by_rid[req.rid] = req
        bisect.insort(self._waiting, req, key=lambda item: item.order)

    def waiting_in_order(self) -> Iterator[Req]:
        """A snapshot, so that the caller may start what it is given."""
        return iter(self._waiting[:])

    def start(self, req: Req) -> None:
        """From waiting to running."""
        self._waiting.remove(req)
        req.row = self._free_rows.pop()
        self.running.append(req)

    def retract(self, req: Req) -> None:
        """From running back to waiting; its place in the order is the one it had."""
        self._leave_running(req)
        req.leave_pool()
        bisect.insort(self._waiting, req, key=lambda item: item.order)

    def remove(self, req: Req) -> None:
        """Out of the engine, from either state."""
        del self._by_rid[req.rid]
        if req.is_running:
            self._leave_running(req)
        else:
            self._waiting.remove(req)

    def _leave_running(self, req: Req) -> None:
        self.running.remove(req)
        self._free_rows.append(req.row)
        req.row = -1

    def youngest_running(self) -> Req:
        """The one that gives way first: lowest priority, then last to arrive; none whose pages another engine reads."""
        return max((req for req in self.running if not req.is_lent), key=lambda item: item.order)

    def matching(self, rid_prefix: str, *, exact: bool = False) -> list[Req]:
        """Requests whose rid starts with `rid_prefix`, or is it."""
        if exact:
            return [self._by_rid[rid_prefix]] if rid_prefix in self._by_rid else []
        return [req for rid, req in self._by_rid.items() if rid.startswith(rid_prefix)]
