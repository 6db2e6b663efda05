"""Which dp rank gets a request: the one it names, its session's, else the one with the least to do. Pure host code."""

from __future__ import annotations

from collections import OrderedDict

MAX_SESSIONS = 100_000


class DpRouter:
    """Keeps a session on its rank, where its prefix is cached; the sessions used longest ago are forgotten first."""

    def __init__(self, dp_size: int) -> None:
        self._load = [0] * dp_size
        self._sessions: OrderedDict[str, int] = OrderedDict()

    def choose(self, session_id: str | None = None, routed_dp_rank: int | None = None) -> int:
        """A rank for one request; pair it with `release`."""
        rank = routed_dp_rank
        if rank is None and session_id is not None:
            rank = self._sessions.get(session_id)
        if rank is None:
            rank = self._load.index(min(self._load))
        if session_id is not None:
            self._sessions[session_id] = rank
            self._sessions.move_to_end(session_id)
            if len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)
        self._load[rank] += 1
        return rank

    def release(self, rank: int) -> None:
        """A request of this rank has ended."""
        self._load[rank] -= 1
