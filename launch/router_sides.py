"""The servers behind `torchrun.sh route`: which of them a request goes to, and how each is."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from ..engine.entrypoints.info import SIDE_HEADER

logger = logging.getLogger(__name__)

PREFILL, DECODE = "prefill", "decode"
CONNECT_TIMEOUT_S = 5.0
# Between questions for the health of all, each of which may take as long as a connection.
PROBE_S = 2.0


@dataclass(eq=False)
class Side:
    """A server. `problem` says why it is asked only where nobody else is left; empty: it is well. `num_running` requests of
    this router are there now, `chosen` tells which was chosen longest ago. `bootstrap` is where a prefill's is found."""

    kind: str
    url: str
    bootstrap: tuple[str, int] | None = None
    problem: str = ""
    num_running: int = 0
    num_requests: int = 0
    num_failures: int = 0
    chosen: int = 0

    def __str__(self) -> str:
        return f"the {self.kind}'s side {self.url}"

    @contextmanager
    def serving(self) -> Iterator[None]:
        """While a request is there."""
        self.num_requests += 1
        self.num_running += 1
        try:
            yield
        finally:
            self.num_running -= 1

    def found(self, problem: str) -> None:
        """How it is by now."""
        if problem != self.problem:
            logger.warning("%s: %s", self, problem or "is well again")
        self.problem = problem


class Sides:
    """All servers, and the client that asks them."""

    def __init__(self, prefills: Sequence[Side], decodes: Sequence[Side], client: httpx.AsyncClient) -> None:
        self.prefills, self.decodes, self.client = prefills, decodes, client
        self._turns = itertools.count(1)

    @property
    def all(self) -> Sequence[Side]:
        return [*self.prefills, *self.decodes]

    def choose(self, sides: Sequence[Side], session: str | None = None) -> Side:
        """One that is well, or any where none is. A session stays with one, whatever router it comes through, as long as
        that is well; other requests go where the fewest run, and in turn."""
        well = [side for side in sides if not side.problem] or sides
        if session is not None:
            return max(well, key=lambda side: hashlib.blake2b(f"{side.url} {session}".encode()).digest())
        side = min(well, key=lambda side: (side.num_running, side.chosen))
        side.chosen = next(self._turns)
        return side

    def first(self, sides: Sequence[Side]) -> Side:
        """The same one as long as it is well."""
        return next((side for side in sides if not side.problem), sides[0])

    async def check(self, path: str = "/health", timeout_s: float = CONNECT_TIMEOUT_S) -> str:
        """Ask all for their health, by one of the paths that say it; why requests cannot be served, or empty."""
        problems = await asyncio.gather(*(self._check(side, path, timeout_s) for side in self.all))
        if path == "/health":
            for side, problem in zip(self.all, problems, strict=True):
                side.found(problem)
        found = dict(zip(self.all, problems, strict=True))
        for sides in (self.prefills, self.decodes):
            if all(found[side] for side in sides):
                return "; ".join(f"{side}: {found[side]}" for side in sides)
        return ""

    async def _check(self, side: Side, path: str, timeout_s: float) -> str:
        try:
            answer = await self.client.get(side.url + path, timeout=timeout_s)
        except httpx.HTTPError as error:
            return f"cannot be reached: {said(error)}"
        if answer.is_error:
            return f"{path} answers {answer.status_code}: {answer.text[:200]}"
        # Other servers of the dialect do not say it.
        kind = answer.headers.get(SIDE_HEADER, side.kind)
        return "" if kind == side.kind else f"is a server with --disaggregation {kind}"

    async def probe(self) -> None:
        """For ever."""
        while True:
            await self.check()
            await asyncio.sleep(PROBE_S)


def said(error: Exception) -> str:
    """Some errors have no words."""
    return str(error) or type(error).__name__
