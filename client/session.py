"""Sessions: a tree of turns, of which the server ships every row once (`routed_experts_start_len: "auto"`), and the client
puts them together.

Legend: M MoE layers, K experts per token.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .answer import Generation, RoutesError


@dataclass(frozen=True, eq=False)
class Turn:
    """One answer: all `tokens` of its prompt and itself, and the `routes` [R, M, K] of all that were inputs, from position
    0 on; in a session with `return_router_weights` also their combine `weights`. `generation.routes` are those that came
    with it."""

    tokens: list[int]
    routes: np.ndarray
    generation: Generation
    weights: np.ndarray | None = None


# Arrays [R, M, K] of the same rows: routes and, where they are asked for, their combine weights.
_Rows = tuple[np.ndarray, ...]


class SessionHistory:
    """What the caller of a session has: the branches of its tree, each with the rows of all its tokens that were inputs."""

    def __init__(self, session_id: str, given: dict[str, Any]) -> None:
        self.session_id = session_id
        self._given = {**given, "session_id": session_id}
        self._branches: list[tuple[np.ndarray, _Rows]] = []

    def next_request(self, input_ids: Sequence[int]) -> dict[str, Any]:
        """Arguments of `generate` or `samples` for the next turn."""
        ids = [operator.index(token) for token in input_ids]
        return dict(input_ids=ids, start_len="auto", **self._given)

    def commit(self, prompt: list[int], generations: Sequence[Generation]) -> list[Turn]:
        """Take in the choices of one prompt, or raise and stay as it was.

        Raises:
            RoutesError: rows are missing before those that came: an answer of this session got lost. State a start then.
        """
        turns: list[Turn] = []
        for generation in generations:
            meta = generation.meta
            assert generation.routes is not None and meta is not None, "a session asks for routes"
            new = _rows_of(generation.routes, generation.weights)
            # Rows of the prompt that a choice shares are those of the first.
            known = self._known(prompt) if not turns else _rows_of(turns[0].routes, turns[0].weights, len(prompt))
            joined = self._join(known, meta.start, new) if meta.start else new
            weights = joined[1] if len(joined) > 1 else None
            turns.append(Turn(prompt + generation.output_ids, joined[0], generation, weights))
        for turn in turns:
            self._add(np.array(turn.tokens[: len(turn.routes)]), _rows_of(turn.routes, turn.weights))
        return turns

    def _join(self, known: _Rows, start: int, new: _Rows) -> _Rows:
        """Rows [0, start) that are known, and those that came."""
        num_known = len(known[0]) if known else 0
        if start > num_known:
            raise RoutesError(
                f"routed experts: rows {num_known} to {start} are missing, in session {self.session_id!r}"
            )
        were, now = ([(rows.dtype.name, rows.shape[1:]) for rows in each] for each in (known, new))
        if were != now:
            raise RoutesError(f"routed experts: rows were {were}, now {now}")
        return tuple(np.concatenate([old[:start], rows]) for old, rows in zip(known, new, strict=True))

    def _known(self, prompt: list[int]) -> _Rows:
        """The rows of as many leading tokens as there are."""
        ids = np.array(prompt)
        shared = [_num_equal(tokens, ids) for tokens, _ in self._branches]
        best = max(range(len(shared)), key=shared.__getitem__, default=None)
        return () if best is None else tuple(rows[: shared[best]] for rows in self._branches[best][1])

    def _add(self, tokens: np.ndarray, rows: _Rows) -> None:
        others = [one for one in self._branches if _num_equal(one[0], tokens) < len(one[0])]
        self._branches = [*others, (tokens, rows)]


def _rows_of(routes: np.ndarray, weights: np.ndarray | None, end: int | None = None) -> _Rows:
    return (routes[:end],) if weights is None else (routes[:end], weights[:end])


def _num_equal(first: np.ndarray, second: np.ndarray) -> int:
    most = min(len(first), len(second))
    different = np.flatnonzero(first[:most] != second[:most])
    return int(different[0]) if len(different) else most


class Session(SessionHistory):
    """A session whose turns have the rows from position 0 on, however few came with each."""

    def __init__(self, samples: Callable[..., list[Generation]], session_id: str, given: dict[str, Any]) -> None:
        super().__init__(session_id, given)
        self._samples = samples

    def turn(self, input_ids: Sequence[int], *, n: int = 1) -> list[Turn]:
        """`n` answers to a whole prompt: the continuation of a turn, a branch of one, or a beginning.

        Raises:
            RoutesError, ServerError: as `Client.generate`; the session is as before the turn.
        """
        request = self.next_request(input_ids)
        return self.commit(request["input_ids"], self._samples(n=n, **request))


class AsyncSession(SessionHistory):
    """As `Session`, with `await`."""

    def __init__(self, samples: Callable[..., Any], session_id: str, given: dict[str, Any]) -> None:
        super().__init__(session_id, given)
        self._samples = samples

    async def turn(self, input_ids: Sequence[int], *, n: int = 1) -> list[Turn]:
        """As `Session.turn`."""
        request = self.next_request(input_ids)
        return self.commit(request["input_ids"], await self._samples(n=n, **request))
