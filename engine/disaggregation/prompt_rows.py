"""Rows of a prompt as they come, one run of positions after the other: on one side from the ledger, on the other from
answers. Pure numpy, and for one thread at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..routing.geometry import WEIGHT_DTYPES, RouteGeometry
from ..routing.ledger import RouteSlice

Versions = list[tuple[str, int, int]]


class PromptRows:
    """Rows of positions `[start, limit)`, of which `[start, end)` are there, with the weight version of each."""

    def __init__(self, geometry: RouteGeometry, start: int, limit: int) -> None:
        weights = [WEIGHT_DTYPES[geometry.weights_dtype]] if geometry.has_weights else []
        shape = (limit - start, geometry.num_moe_layers, geometry.top_k)
        # Memory that nothing is written to yet is not taken yet.
        self._columns = [np.empty(shape, dtype) for dtype in (geometry.dtype, *weights)]
        self._versions: Versions = []
        self.row_bytes = geometry.row_bytes + geometry.weights_row_bytes
        self.start = self.end = start
        self.limit = limit

    def add(self, found: RouteSlice) -> None:
        """The next ones."""
        assert found.start == self.end and self.end + len(found.rows) <= self.limit
        where = slice(self.end - self.start, self.end - self.start + len(found.rows))
        new = [found.rows] if found.weights is None else [found.rows, found.weights]
        for column, added in zip(self._columns, new, strict=True):
            column[where] = added
        for name, start, end in found.weight_versions:
            if self._versions and self._versions[-1][0] == name:
                start = self._versions.pop()[1]
            self._versions.append((name, start, end))
        self.end += len(found.rows)

    def add_frames(self, end: int, versions: Versions, frames: Sequence[memoryview]) -> None:
        """The next ones, up to `end`, as an answer has them.

        Raises:
            ValueError: it is something else.
        """
        if not self.end < end <= self.limit:
            raise ValueError(f"rows {self.end} .. {end} have arrived of those before {self.limit}")
        shape = (end - self.end, *self._columns[0].shape[1:])
        sizes = [math.prod(shape) * column.itemsize for column in self._columns]
        if [frame.nbytes for frame in frames] != sizes:
            found = [frame.nbytes for frame in frames]
            raise ValueError(f"{found} bytes of rows {self.end} .. {end} have arrived in place of {sizes}")
        bounds = [self.end, *(last for _, _, last in versions)]
        if bounds[-1] != end or any(run[1:] != pair for run, pair in zip(versions, _pairs(bounds), strict=True)):
            raise ValueError(f"rows {self.end} .. {end} have arrived with weight versions of others: {versions}")
        both = zip(self._columns, frames, strict=True)
        rows, *weights = [np.frombuffer(frame, column.dtype).reshape(shape) for column, frame in both]
        self.add(RouteSlice(self.end, rows, versions, weights[0] if weights else None))

    def cut(self, start: int, end: int) -> RouteSlice:
        """Those of positions `[start, end)`, which are there; not copied."""
        assert self.start <= start <= end <= self.end
        rows, *weights = [column[start - self.start : end - self.start] for column in self._columns]
        clipped = [(name, max(first, start), min(last, end)) for name, first, last in self._versions]
        kept = [run for run in clipped if run[1] < run[2]]
        return RouteSlice(start, rows, kept, weights[0] if weights else None)


def _pairs(bounds: list[int]) -> list[tuple[int, int]]:
    """Runs between bounds, none of them empty.

    Raises:
        ValueError: one is.
    """
    pairs = list(zip(bounds, bounds[1:], strict=False))
    if any(first >= last for first, last in pairs):
        raise ValueError(f"weight versions of no rows have arrived: {pairs}")
    return pairs
