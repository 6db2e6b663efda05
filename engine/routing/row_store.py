"""Host memory of one value [M, K] a KV slot - ids, or combine weights - filed by the step and read by the page.

Legend: M MoE layers, K experts per token, n rows of a step, R rows of a slice.
"""

from __future__ import annotations

from typing import Any

import numpy as np


class RowStore:
    """One slot more than the pages have: nobody's, the last."""

    def __init__(self, num_pages: int, page_size: int, num_layers: int, top_k: int, dtype: np.dtype[Any]) -> None:
        num_slots = num_pages * page_size
        self._rows = np.empty((num_slots + 1, num_layers, top_k), dtype=dtype)
        # The same memory, by page, and with a row as one item.
        self._page_rows = self._rows[:num_slots].reshape(num_pages, page_size, num_layers, top_k)
        self._layer_item = np.dtype((np.void, top_k * dtype.itemsize))
        self._row_item = np.dtype((np.void, num_layers * top_k * dtype.itemsize))
        self._row_items = self._rows.reshape(num_slots + 1, -1).view(self._row_item)[:, 0]

    def put(self, slots: np.ndarray, rows: np.ndarray) -> None:
        """Rows [M, n, K], as the ring holds them, at memory speed: they become items of one opaque type, turned from
        layer-major to token-major and scattered."""
        by_token = np.ascontiguousarray(rows.view(self._layer_item)[..., 0].T)
        self._row_items[slots] = by_token.view(self._row_item)[:, 0]

    def put_plainly(self, slots: np.ndarray, rows: np.ndarray) -> None:
        """The slow twin of `put`."""
        self._rows[slots] = rows.transpose(1, 0, 2)

    def take(self, pages: np.ndarray, cut: slice) -> np.ndarray:
        """A copy [R, M, K] of the pages' slots, then cut."""
        return self._page_rows[pages].reshape(-1, *self._rows.shape[1:])[cut]
