"""Which rows the callers of sessions have: what `routed_experts_start_len: "auto"` answers from.

A row depends on the tokens up to its own position alone, so what a caller has is a set of token sequences with the rows of
all their tokens, the turns of a conversation and its branches. A session that was forgotten has nothing: its next answer
is larger, and as right. Pure host code; used from the event loop and from threads.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np

from ..validation.token_ids import Ids
from .dp_router import digest_of

# What an edge takes beside its tokens, some 400 bytes, in tokens of four.
EDGE_TOKENS = 100


class _Edge:
    """Tokens behind those of its parent, and what may follow them, by the first token."""

    __slots__ = ("children", "tokens")

    def __init__(self, tokens: Ids) -> None:
        self.tokens = tokens
        self.children: dict[int, _Edge] = {}


class TokenTree:
    """Token sequences that share their beginnings, `num_tokens` on `num_edges`. Whoever has one has all its beginnings."""

    def __init__(self) -> None:
        self.num_tokens = self.num_edges = 0
        self._root = _Edge(np.empty(0, np.int32))

    @property
    def size(self) -> int:
        """The memory that it takes, in tokens."""
        return self.num_tokens + EDGE_TOKENS * self.num_edges

    def common_prefix(self, ids: Ids) -> int:
        """Tokens from the start of `ids` on that one of the sequences begins with."""
        return self._walk(ids)[2]

    def _walk(self, ids: Ids) -> tuple[_Edge, int, int]:
        """The last edge that `ids` reach, how many of its tokens they share, and how many in all."""
        edge, shared, total = self._root, 0, 0
        while total < len(ids) and shared == len(edge.tokens) and (child := edge.children.get(int(ids[total]))):
            edge, shared = child, num_equal(child.tokens, ids[total:])
            total += shared
        return edge, shared, total

    def add(self, ids: Ids) -> None:
        edge, shared, total = self._walk(ids)
        if total == len(ids):
            return
        if shared < len(edge.tokens):
            # Copies, so that neither keeps the other's memory.
            rest = _Edge(edge.tokens[shared:].copy())
            rest.children = edge.children
            edge.tokens, edge.children = edge.tokens[:shared].copy(), {int(rest.tokens[0]): rest}
            self.num_edges += 1
        rest_ids = ids[total:].astype(np.int32)
        self.num_tokens += len(rest_ids)
        if edge is not self._root and not edge.children:
            # A conversation that only goes on stays one edge.
            edge.tokens = np.concatenate([edge.tokens, rest_ids])
            return
        edge.children[int(rest_ids[0])] = _Edge(rest_ids)
        self.num_edges += 1


def num_equal(first: Ids, second: Ids) -> int:
    """Leading tokens that both have."""
    most = min(len(first), len(second))
    different = np.flatnonzero(first[:most] != second[:most])
    return int(different[0]) if len(different) else most


class SessionRoutes:
    """At most `max_sessions`, of a size of `max_tokens` in all; those used longest ago are forgotten first."""

    def __init__(self, max_sessions: int, max_tokens: int) -> None:
        self._max_sessions, self._max_tokens = max_sessions, max_tokens
        # By digest: the names are the clients' choice.
        self._sessions: OrderedDict[bytes, TokenTree] = OrderedDict()
        self._lock = threading.Lock()
        self._num_tokens = self._num_forgotten = 0

    def num_delivered(self, session_id: str, ids: Ids) -> int:
        """Leading tokens of `ids` whose rows the session's caller has."""
        key = digest_of(session_id.encode())
        with self._lock:
            tree = self._sessions.get(key)
            if tree is None:
                return 0
            self._sessions.move_to_end(key)
            return tree.common_prefix(ids)

    def add(self, session_id: str, ids: Ids, start: int) -> None:
        """The caller got the rows of `ids[start:]`. Where it is not known any more that it has those before them, nothing
        is remembered."""
        key = digest_of(session_id.encode())
        with self._lock:
            tree = self._sessions.get(key) or TokenTree()
            if tree.common_prefix(ids) < start:
                return
            before = tree.size
            tree.add(ids)
            self._num_tokens += tree.size - before
            self._sessions[key] = tree
            self._sessions.move_to_end(key)
            while len(self._sessions) > self._max_sessions or self._num_tokens > self._max_tokens:
                _, oldest = self._sessions.popitem(last=False)
                self._num_tokens -= oldest.size
                self._num_forgotten += 1

    def counters(self) -> dict[str, int]:
        with self._lock:
            return {
                "num_route_sessions": len(self._sessions),
                "num_route_session_tokens": self._num_tokens,
                "num_route_sessions_forgotten": self._num_forgotten,
            }
