"""Host store of routes by KV slot, and which of its rows answer for which request.

A row lives in the slot that its token's KV lives in, so a prefix-cache hit finds the prefix's rows with no work. The
ledger follows the leader's records in order; order replaces locks: a slot that is reused later cannot spoil a slice made
now. Allocating a page invalidates the rows of its slots, so a row that was not written since is missing, never stale.

First filed wins for every (request, position): a retraction snapshots the request's rows, and the snapshot answers for
it from then on, whatever its re-prefill routes. The slot holds the rows of the forward that computed the KV now in it.

A step is filed with one copy (`file_step`), whatever the number of its requests; `file` is the slow twin. Where combine
weights are recorded they are filed, snapshot and sliced as the ids are, by the same slots.

Legend: M MoE layers, K experts per token, P pages, S tokens of a page. Pure numpy: no sockets, no threads, no torch.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..io_struct import Segment
from .geometry import WEIGHT_DTYPES, RouteGeometry
from .row_store import RowStore
from .wire import version_runs

NEVER_WRITTEN = -1


class MissingRoutesError(Exception):
    """Rows that were asked for are not there. They are never padded."""


@dataclass(frozen=True)
class RouteSlice:
    """Rows [R, M, K] of the positions from `start` on, their weight versions as runs of positions, and the combine weights
    [R, M, K] of a request that asked for them."""

    start: int
    rows: np.ndarray
    weight_versions: list[tuple[str, int, int]]
    weights: np.ndarray | None = None


# Versions [R] of consecutive rows, their ids [R, M, K] and, where a request asks for them, their combine weights [R, M, K].
_Columns = tuple[np.ndarray, ...]


@dataclass
class _ReqRoutes:
    """One request's claim on the stores, the first `num_stores` of which it wants. Rows before `num_snapshot` come from the
    snapshots, the others from its pages."""

    keep: bool
    num_stores: int
    pages: array[int] = field(default_factory=lambda: array("i"))
    num_filed: int = 0
    snapshots: list[_Columns] = field(default_factory=list)

    @property
    def num_snapshot(self) -> int:
        return sum(len(versions) for versions, *_ in self.snapshots)


class RouteLedger:
    """The rows of one dp rank's KV pool."""

    def __init__(self, num_pages: int, page_size: int, geometry: RouteGeometry) -> None:
        self._page_size = page_size
        self.geometry = geometry
        num_slots = num_pages * page_size
        # One slot more than there are: nobody's, where the rows of discarded segments go.
        self._nobodys_slot = num_slots
        self._versions = np.full(num_slots + 1, NEVER_WRITTEN, dtype=np.int32)
        self._page_versions = self._versions[:num_slots].reshape(num_pages, page_size)
        dtypes = [geometry.dtype, *([WEIGHT_DTYPES[geometry.weights_dtype]] if geometry.has_weights else [])]
        self._stores = [
            RowStore(num_pages, page_size, geometry.num_moe_layers, geometry.top_k, dtype) for dtype in dtypes
        ]
        self._version_names: list[str] = []
        self._version_indices: dict[str, int] = {}
        self._reqs: dict[str, _ReqRoutes] = {}

    def start(self, rid: str, *, keep: bool, weights: bool = False) -> None:
        """A request arrives; `keep` says that its rows will be asked for, `weights` that their combine weights will be."""
        assert rid not in self._reqs
        num_stores = 1 + weights
        assert num_stores <= len(self._stores), "the frontend refuses who asks for what is not recorded"
        self._reqs[rid] = _ReqRoutes(keep, num_stores)

    def admit(self, rid: str, cached_pages: bytes) -> None:
        """It runs on these pages of the prefix cache, whose rows are there already."""
        req = self._reqs[rid]
        assert not req.pages
        req.pages.frombytes(cached_pages)
        req.num_filed = len(req.pages) * self._page_size

    def allocate(self, segment: Segment) -> None:
        """The segment's new pages join the request; whatever their slots held is invalid from now on."""
        self._page_versions[np.frombuffer(segment.new_pages, dtype="<i4")] = NEVER_WRITTEN
        req = self._reqs.get(segment.rid)
        if req is not None:
            req.pages.frombytes(segment.new_pages)

    def file(self, segment: Segment, rows: np.ndarray, weight_version: str, weights: np.ndarray | None = None) -> None:
        """Store rows [M, n, K] of a segment of n tokens, as the ring holds them."""
        slots = array("q")
        self._take_slots(self._reqs[segment.rid], segment, slots)
        where = np.frombuffer(slots, dtype=np.int64)
        for store, column in self._to_file(rows, weights):
            store.put_plainly(where, column)
        self._versions[where] = self._version_index(weight_version)

    def _to_file(self, rows: np.ndarray, weights: np.ndarray | None) -> Iterator[tuple[RowStore, np.ndarray]]:
        """What goes into which store."""
        columns = [rows] if weights is None else [rows, weights]
        return zip(self._stores, columns, strict=True)

    def file_step(
        self, segments: Sequence[Segment], rows: np.ndarray, weight_version: str, weights: np.ndarray | None = None
    ) -> int:
        """Allocate and file all segments of a step. Their rows [M, n, K] stand in their order, those of discarded ones too,
        and so do their combine weights, where they are recorded.

        Returns:
            How many rows were filed.
        """
        new_pages = b"".join([segment.new_pages for segment in segments])
        self._page_versions[np.frombuffer(new_pages, dtype="<i4")] = NEVER_WRITTEN
        slots, num_discarded = array("q"), 0
        for segment in segments:
            if segment.discarded:
                slots.extend([self._nobodys_slot] * segment.num_tokens)
                num_discarded += segment.num_tokens
            else:
                req = self._reqs[segment.rid]
                req.pages.frombytes(segment.new_pages)
                self._take_slots(req, segment, slots)
        where = np.frombuffer(slots, dtype=np.int64)
        for store, column in self._to_file(rows, weights):
            store.put(where, column)
        self._versions[where] = self._version_index(weight_version)
        return len(where) - num_discarded

    def adopt(self, rid: str, new_pages: bytes, num_tokens: int, found: RouteSlice | None) -> int:
        """The next `num_tokens` positions stand on new pages, computed by another engine; file the rows that it has sent as
        if they had been made here. None: they have not come, and so are missing.

        Returns:
            How many rows were filed.
        """
        self._page_versions[np.frombuffer(new_pages, dtype="<i4")] = NEVER_WRITTEN
        req, slots = self._reqs[rid], array("q")
        req.pages.frombytes(new_pages)
        self._take_slots(req, Segment(rid, req.num_filed, num_tokens, new_pages), slots)
        if found is None or not num_tokens:
            return 0
        where = np.frombuffer(slots, dtype=np.int64)
        assert len(found.rows) == num_tokens
        columns = [found.rows] if found.weights is None else [found.rows, found.weights]
        for store, column in zip(self._stores, columns, strict=True):
            store.put_plainly(where, column.transpose(1, 0, 2))
        for name, start, end in found.weight_versions:
            self._versions[where[start - found.start : end - found.start]] = self._version_index(name)
        return num_tokens

    def _take_slots(self, req: _ReqRoutes, segment: Segment, slots: array[int]) -> None:
        """Add the slots of the segment's positions, which are filed from now on, to `slots`."""
        size, start, end = self._page_size, segment.start, segment.start + segment.num_tokens
        assert start == req.num_filed, f"{segment.rid}: rows from {start}, {req.num_filed} were filed"
        req.num_filed = end
        if segment.num_tokens == 1:
            slots.append(req.pages[start // size] * size + start % size)
            return
        first = start // size
        table = np.array(req.pages[first : -(-end // size)], dtype=np.int64)
        positions = np.arange(start, end)
        slots.frombytes((table[positions // size - first] * size + positions % size).tobytes())

    def _version_index(self, name: str) -> int:
        index = self._version_indices.setdefault(name, len(self._version_names))
        if index == len(self._version_names):
            self._version_names.append(name)
        return index

    def retract(self, rid: str) -> None:
        """The request gives its pages up: snapshot what it has filed beyond its last snapshot."""
        req = self._reqs[rid]
        if req.keep and req.num_filed > req.num_snapshot:
            columns = self._gather(req, req.num_snapshot, req.num_filed)
            req.snapshots.append(tuple(column.copy() for column in columns))
        req.pages = array("i")
        req.num_filed = 0

    def _gather(self, req: _ReqRoutes, start: int, end: int) -> _Columns:
        """What [start, end) have, from the request's pages: page-wise, then cut."""
        end = max(start, end)
        first = start // self._page_size
        table = np.array(req.pages[first : -(-end // self._page_size)], dtype=np.int64)
        cut = slice(start - first * self._page_size, end - first * self._page_size)
        stores = self._stores[: req.num_stores]
        return self._page_versions[table].reshape(-1)[cut], *(store.take(table, cut) for store in stores)

    def flush(self) -> None:
        """The prefix cache was emptied: no row answers for anybody any more."""
        self._versions[:] = NEVER_WRITTEN

    def drop(self, rid: str) -> None:
        """The request is gone; its pages belong to the cache or to nobody."""
        del self._reqs[rid]

    def num_on_pages(self, rid: str) -> int:
        """Positions from 0 whose rows stand on the request's pages."""
        return self._reqs[rid].num_filed

    def num_rows(self, rid: str) -> int:
        """Consecutive positions from 0 that have a row for this request."""
        req = self._reqs[rid]
        return max(req.num_filed, req.num_snapshot)

    def get_topk(self, rid: str, start_len: int, seqlen: int) -> RouteSlice:
        """Rows of the absolute positions [start_len, seqlen - 1): the last token was never an input and has none.

        A start beyond `seqlen - 1` gives no rows.

        Raises:
            ValueError: `start_len` is negative.
            MissingRoutesError: a row in the range was not filed, or its slot was given up.
        """
        if start_len < 0:
            raise ValueError(f"routed_experts_start_len={start_len} is lower than 0")
        end = max(seqlen - 1, 0)
        start = min(start_len, end)
        req = self._reqs[rid]
        if end > self.num_rows(rid):
            raise MissingRoutesError(f"{rid}: rows from position {self.num_rows(rid)} on were not filed")
        num_snapshot = req.num_snapshot
        parts = []
        if start < num_snapshot:
            # A copy, so that a short slice does not keep a long snapshot alive.
            parts.append(tuple(np.concatenate(column)[start:end].copy() for column in zip(*req.snapshots, strict=True)))
        if end > num_snapshot or not parts:
            parts.append(self._gather(req, max(start, num_snapshot), end))
        versions, rows, *weights = _joined(parts)
        missing = np.flatnonzero(versions == NEVER_WRITTEN)
        if len(missing):
            raise MissingRoutesError(
                f"{rid}: {len(missing)} rows are missing, the first at position {start + missing[0]}"
            )
        runs = version_runs(versions, self._version_names, start)
        return RouteSlice(start, rows, runs, weights[0] if weights else None)


def _joined(parts: list[_Columns]) -> _Columns:
    """Of consecutive parts. One part, the usual case, is a copy already: 12.6 MB of ids at 32k rows."""
    if len(parts) == 1:
        return parts[0]
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))
