"""A rank of a prefill's side: what of its pool may be fetched, and the copies of it."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..io_struct import FirstToken
from ..plan import DropPages, PageMessage, SharePages
from .page_copy import PageCopy
from .transfer_server import Endings
from .wire import Answer, Ended, Fetch, FetchPositions, Positions, Release

# Of one answer: as long as it is copied, the step thread may have to wait to take pages away.
BLOCK_BYTES = 1 << 20


@dataclass
class _SharedPrompt:
    """Positions `[0, num_ready)` stand on `pages`."""

    pages: array[int] = field(default_factory=lambda: array("i"))
    num_ready: int = 0
    first: FirstToken | None = None


class SharedPrompts:
    """`Answers` of a page server. The step thread shares and drops; the server's thread copies, and pages that are dropped
    are not read any more once `handle` returns. `wake` tells the server, `on_release` what the other side has said."""

    def __init__(self, copy: PageCopy, on_release: Callable[[Release], None]) -> None:
        self._copy = copy
        self._on_release = on_release
        self._lock = threading.Lock()
        self._prompts: dict[str, _SharedPrompt] = {}
        self._endings = Endings()
        self.wake: Callable[[], None] = lambda: None
        self._num_bytes = 0

    # --- the step thread --------------------------------------------------------------------------------------------

    def handle(self, message: PageMessage) -> None:
        with self._lock:
            if isinstance(message, SharePages):
                self._copy.mark()
                self._endings.forget(message.key)
                prompt = self._prompts.setdefault(message.key, _SharedPrompt())
                prompt.pages.frombytes(message.pages)
                prompt.num_ready, prompt.first = message.num_ready, message.first
            else:
                assert isinstance(message, DropPages), "this side fetches nothing"
                self._prompts.pop(message.key, None)
                self._endings.add(message.key, message.error or "the prefill's side has let go of it")
        self.wake()

    def counters(self) -> dict[str, int | float]:
        return {"transferred_bytes": self._num_bytes, "transfer_seconds": 0.0}

    # --- the server's thread ----------------------------------------------------------------------------------------

    def release(self, message: Release) -> None:
        self._on_release(message)

    def answer(self, fetch: Fetch) -> tuple[Answer, Sequence[memoryview]] | None:
        if not isinstance(fetch, FetchPositions):
            return Ended(fetch.key, fetch.attempt, "no rows are to be had here"), []
        with self._lock:
            error = self._endings.get(fetch.key)
            if error is not None:
                return Ended(fetch.key, fetch.attempt, error), []
            prompt = self._prompts.get(fetch.key)
            if prompt is None:
                return None
            if fetch.start >= fetch.end:
                return None if prompt.first is None else (Ended(fetch.key, fetch.attempt, "", prompt.first), [])
            most = max(1, BLOCK_BYTES // self._copy.bytes_per_position(fetch.heads))
            end = min(fetch.end, prompt.num_ready, fetch.start + most)
            if end <= fetch.start:
                if prompt.first is not None:
                    return Ended(fetch.key, fetch.attempt, f"the prompt has {prompt.num_ready} positions"), []
                return None
            pages = np.frombuffer(prompt.pages, dtype=np.int32)
            frame = self._copy.gather(pages, fetch.start, end, fetch.heads)
            del pages
        self._num_bytes += frame.nbytes
        return Positions(fetch.key, fetch.attempt, fetch.start, end), [frame]
