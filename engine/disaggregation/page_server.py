"""A rank of a prefill's side: what of its pool may be fetched, and the copies of it."""

from __future__ import annotations

import itertools
import logging
import threading
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..io_struct import FirstToken
from ..plan import DropPages, PageMessage, SharePages
from .page_copy import Heads, PageCopy, byte_counters
from .pool_export import PoolExport
from .transfer_server import Endings
from .wire import CARRIERS, Answer, Ended, Fetch, FetchPositions, PoolPositions, Positions, Release

logger = logging.getLogger(__name__)

# Of one answer: as long as it is copied, the step thread may have to wait to take pages away.
BLOCK_BYTES = 1 << 20
LET_GO = "the prefill's side has let go of it"
# Who has all of it asks no more.
IS_DONE = f"{LET_GO}; has an earlier request had its bootstrap_room?"


@dataclass
class _SharedPrompt:
    """Positions `[0, num_ready)` stand on `pages`: they are committed, so they were computed, for the step's results, which
    the leader has, depend on them, on every rank. No other prompt has the number `lease`."""

    lease: int
    pages: array[int] = field(default_factory=lambda: array("i"))
    num_ready: int = 0
    first: FirstToken | None = None


class SharedPrompts:
    """`Answers` of a page server. The step thread shares and drops; the server's thread copies, and pages that are dropped
    are not read any more here once `handle` returns. Who reaches the pool of `export` copies by itself, and learns from the
    next answer whether the pages were still the prompt's. `wake` tells the server, `on_release` what the other side has
    said. `transport` is the option of this side."""

    def __init__(
        self,
        copy: PageCopy,
        on_release: Callable[[Release], None],
        export: PoolExport | None = None,
        transport: str = "auto",
    ) -> None:
        self._copy = copy
        self._on_release = on_release
        self._export = export
        self._transport = transport
        self._leases = itertools.count(1)
        self._lock = threading.Lock()
        self._prompts: dict[str, _SharedPrompt] = {}
        self._endings = Endings()
        self.wake: Callable[[], None] = lambda: None
        self._num_bytes = dict.fromkeys(CARRIERS, 0)

    # --- the step thread --------------------------------------------------------------------------------------------

    def handle(self, message: PageMessage) -> None:
        with self._lock:
            if isinstance(message, SharePages):
                prompt = self._prompts.get(message.key)
                if prompt is None:
                    prompt = self._prompts[message.key] = _SharedPrompt(next(self._leases))
                prompt.pages.frombytes(message.pages)
                prompt.num_ready, prompt.first = message.num_ready, message.first
            else:
                assert isinstance(message, DropPages), "this side fetches nothing"
                self._prompts.pop(message.key, None)
                self._endings.add(message.key, message.error or IS_DONE)
        self.wake()

    def counters(self) -> dict[str, int | float]:
        return {
            **byte_counters(self._num_bytes),
            "transfer_seconds": 0.0,
            "transfer_copy_seconds": 0.0,
        }

    def pool_generation(self) -> int:
        return 0 if self._export is None else self._export.generation

    # --- the server's thread ----------------------------------------------------------------------------------------

    def release(self, message: Release) -> None:
        self._on_release(message)

    def answer(self, fetch: Fetch) -> tuple[Answer, Sequence[memoryview]] | None:
        if not isinstance(fetch, FetchPositions):
            return Ended(fetch.key, fetch.attempt, "no rows are to be had here"), []
        export = self._export
        reaches = export is not None and export.transport == fetch.transport
        if not reaches and not self._allows_bytes:
            refusal = f"the prefill's side has --disaggregation-transport {self._transport}"
            return Ended(fetch.key, fetch.attempt, refusal), []
        if reaches and fetch.pool != self.pool_generation():
            return self._pool_place(fetch)
        with self._lock:
            error = self._endings.get(fetch.key)
            prompt = self._prompts.get(fetch.key)
            if error is None and fetch.lease and (prompt is None or prompt.lease != fetch.lease):
                error = LET_GO
            if error is not None:
                return Ended(fetch.key, fetch.attempt, error), []
            if prompt is None:
                return None
            if fetch.start >= fetch.end:
                return None if prompt.first is None else (Ended(fetch.key, fetch.attempt, "", prompt.first), [])
            if fetch.start >= prompt.num_ready:
                if prompt.first is not None:
                    return Ended(fetch.key, fetch.attempt, f"the prompt has {prompt.num_ready} positions"), []
                return None
            return self._point(fetch, prompt) if reaches else self._send(fetch, prompt)

    @property
    def _allows_bytes(self) -> bool:
        return self._transport in ("auto", "tcp")

    def _pool_place(self, fetch: FetchPositions) -> tuple[Answer, Sequence[memoryview]] | None:
        """It is asked for, or has moved."""
        assert self._export is not None
        if self._export.generation == 0:
            return None
        try:
            return self._export.place(fetch.key, fetch.attempt), []
        except (OSError, RuntimeError) as error:
            if not self._allows_bytes:
                error_text = f"--disaggregation-transport {self._transport}: the pool cannot be reached: {error}"
                return Ended(fetch.key, fetch.attempt, error_text), []
            logger.warning("keys and values go over TCP: the pool cannot be reached: %s", error)
            self._export = None
            return self.answer(fetch)

    def _end(self, fetch: FetchPositions, prompt: _SharedPrompt, block_bytes: int, heads: Heads) -> int:
        most = max(1, block_bytes // self._copy.bytes_per_position(heads))
        return min(fetch.end, prompt.num_ready, fetch.start + most)

    def _point(self, fetch: FetchPositions, prompt: _SharedPrompt) -> tuple[Answer, Sequence[memoryview]]:
        assert self._export is not None
        # Who reads may take rows with all of their heads.
        end, page_size = self._end(fetch, prompt, self._export.block_bytes, None), self._export.page_size
        self._num_bytes[fetch.transport] += (end - fetch.start) * self._copy.bytes_per_position(fetch.heads)
        pages = prompt.pages[fetch.start // page_size : -(-end // page_size)].tobytes()
        return PoolPositions(fetch.key, fetch.attempt, fetch.start, end, prompt.lease, pages), []

    def _send(self, fetch: FetchPositions, prompt: _SharedPrompt) -> tuple[Answer, Sequence[memoryview]]:
        end = self._end(fetch, prompt, BLOCK_BYTES, fetch.heads)
        frame = self._copy.gather(np.array(prompt.pages, dtype=np.int32), fetch.start, end, fetch.heads)
        self._num_bytes["tcp"] += frame.nbytes
        return Positions(fetch.key, fetch.attempt, fetch.start, end, prompt.lease), [frame]
