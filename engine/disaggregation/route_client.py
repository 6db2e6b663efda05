"""The output processor of a decode's side: fetches the rows of prompts that another engine has computed."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

import numpy as np

from ..io_struct import TransferSource
from ..ipc.frontend_messages import TransferNotice
from ..routing.geometry import WEIGHT_DTYPES, RouteGeometry
from ..routing.ledger import RouteSlice
from .transfer_client import TransferClient
from .wire import Answer, Ended, Fetch, FetchRoutes, Routes, Welcome

# What a notice calls it.
ROUTES = "routes"


class RouteJob:
    """The rows of one prompt from `start` on, `num_rows` of them."""

    def __init__(
        self,
        source: TransferSource,
        attempt: int,
        start: int,
        num_rows: int,
        geometry: RouteGeometry,
        on_end: Callable[[RouteJob, str], None],
    ) -> None:
        self.source = source
        self.attempt = attempt
        self.rows: RouteSlice | None = None
        # Whether the other side has none.
        self.is_missing = False
        self._start = start
        self._num_rows = num_rows
        self._geometry = geometry
        self._on_end = on_end

    def begin(self, welcome: Welcome) -> dict[str, Fetch]:
        return {welcome.routes: FetchRoutes(welcome.incarnation, self.source.key, self.attempt, self._start)}

    def prepare(self, address: str, answer: Answer) -> None:
        """Rows go to memory of their own."""

    def take(self, address: str, answer: Answer, frames: Sequence[memoryview]) -> Fetch | None:
        if not isinstance(answer, Routes):
            self.is_missing = isinstance(answer, Ended) and answer.is_missing
            error = answer.error if isinstance(answer, Ended) else ""
            raise ValueError(error or "something else than was asked for has arrived")
        geometry = self._geometry
        dtypes = [geometry.dtype, *([WEIGHT_DTYPES[geometry.weights_dtype]] if geometry.has_weights else [])]
        shape = (self._num_rows, geometry.num_moe_layers, geometry.top_k)
        sizes = [math.prod(shape) * dtype.itemsize for dtype in dtypes]
        if answer.start != self._start or [frame.nbytes for frame in frames] != sizes:
            found = [frame.nbytes for frame in frames]
            raise ValueError(f"{found} bytes of rows from position {answer.start} have arrived in place of {sizes}")
        # Copies: a frame's memory is the socket's.
        columns = [np.frombuffer(bytes(frame), dtype) for frame, dtype in zip(frames, dtypes, strict=True)]
        rows, *weights = [column.reshape(shape) for column in columns]
        self.rows = RouteSlice(self._start, rows, answer.weight_versions, weights[0] if weights else None)
        return None

    def finish(self, error: str) -> None:
        self._on_end(self, error)


class ArrivingRoutes:
    """Rows on their way, and those that wait to be filed. The filing thread asks and takes; `notify(dp_rank, notice)` is
    called on the client's."""

    def __init__(self, client: TransferClient, notify: Callable[[int, TransferNotice], None]) -> None:
        self._client = client
        self._notify = notify
        self._lock = threading.Lock()
        self._arrived: dict[str, RouteSlice] = {}
        self.num_rows = 0
        self.num_failed = 0

    def fetch(
        self, source: TransferSource, dp_rank: int, attempt: int, start: int, num_rows: int, geometry: RouteGeometry
    ) -> None:
        def on_end(job: RouteJob, error: str) -> None:
            self.num_failed += bool(error)
            if job.rows is not None:
                with self._lock:
                    self._arrived[source.key] = job.rows
                self.num_rows += len(job.rows.rows)
            is_lost = bool(error) and not job.is_missing
            self._notify(dp_rank, TransferNotice(source.key, ROUTES, attempt, error, is_lost=is_lost))

        self._client.add(RouteJob(source, attempt, start, num_rows, geometry, on_end))

    def take(self, key: str) -> RouteSlice | None:
        """What has arrived of this prompt."""
        with self._lock:
            return self._arrived.pop(key, None)

    def drop(self, key: str) -> None:
        self._client.drop(key)
        self.take(key)
