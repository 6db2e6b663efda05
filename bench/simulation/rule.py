"""What a forward would have computed, by rule: the next token, and the experts of a token at a position of a rank.

Both sides use it: the runner to fill the ring, the checks to say what must come out at the other end.
"""

from __future__ import annotations

import zlib

import numpy as np

from waybill.engine.routing.geometry import RouteGeometry

NUM_LAYERS, TOP_K, NUM_EXPERTS = 48, 8, 128
TABLE_ROWS = 1 << 16
VOCAB = 250


class Rule:
    """`table` [rows, M, K] are rows with distinct ids; which one a token has depends on token, position and rank."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        first = rng.integers(0, NUM_EXPERTS, (TABLE_ROWS, NUM_LAYERS, 1))
        stride = 2 * rng.integers(0, NUM_EXPERTS // 2, (TABLE_ROWS, NUM_LAYERS, 1)) + 1
        self.table = ((first + stride * np.arange(TOP_K)) % NUM_EXPERTS).astype(np.uint8)

    @staticmethod
    def geometry(max_tokens: int) -> RouteGeometry:
        return RouteGeometry(tuple(range(NUM_LAYERS)), NUM_LAYERS, max_tokens, TOP_K, NUM_EXPERTS)

    @staticmethod
    def entries(dp_rank: int, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Which rows of the table these tokens have."""
        mixed = tokens.astype(np.int64) * 7919 + positions.astype(np.int64) * 104729 + dp_rank * 1299709
        return (mixed ^ (mixed >> 13)) % TABLE_ROWS

    def rows(self, dp_rank: int, tokens: np.ndarray, start: int) -> np.ndarray:
        """Rows [R, M, K] of consecutive tokens, the first one at position `start`."""
        return self.table[self.entries(dp_rank, tokens, np.arange(start, start + len(tokens)))]

    @staticmethod
    def next_token(rid: str, position: int) -> int:
        """The token at `position` of this request's sequence."""
        return (zlib.crc32(rid.encode()) + position * 7919) % VOCAB
