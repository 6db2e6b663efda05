"""The shape of one step's routing: what the ring, the ledger and the wire agree on."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

MAX_UINT8_EXPERTS = 256
# Combine weights as numpy holds them: it has no bfloat16, whose bits stand in its place.
WEIGHT_DTYPES: dict[str, np.dtype[Any]] = {"bfloat16": np.dtype("<u2"), "float32": np.dtype("<f4")}
# A step's bytes are a multiple of it, so that steps beside each other begin where any type may.
ALIGNMENT = 4


class RouteGeometry(msgspec.Struct, frozen=True, array_like=True):
    """Shape of one step's routing. `layer_ids` are the layers of the model that route, in order; `weights_dtype` is that of
    the combine weights that are recorded beside the ids, "" where none are.

    In memory a step of n rows is one block of bytes: the weights `[moe_layers, n, top_k]`, if any, then the ids likewise.
    """

    layer_ids: tuple[int, ...]
    num_layers_total: int
    max_tokens: int
    top_k: int
    num_experts: int
    weights_dtype: str = ""

    @property
    def num_moe_layers(self) -> int:
        return len(self.layer_ids)

    @property
    def dtype(self) -> np.dtype[np.uint8] | np.dtype[np.uint16]:
        """The narrowest type that holds every expert id."""
        return np.dtype(np.uint8) if self.num_experts <= MAX_UINT8_EXPERTS else np.dtype("<u2")

    @property
    def has_weights(self) -> bool:
        return self.weights_dtype != ""

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's ids."""
        return self.num_moe_layers * self.top_k * self.dtype.itemsize

    @property
    def weights_row_bytes(self) -> int:
        """Bytes of one token's weights."""
        if not self.has_weights:
            return 0
        return self.num_moe_layers * self.top_k * WEIGHT_DTYPES[self.weights_dtype].itemsize

    def step_bytes(self, num_rows: int) -> int:
        """Bytes of a step of so many rows."""
        num_bytes = (self.weights_row_bytes + self.row_bytes) * num_rows
        return -(-num_bytes // ALIGNMENT) * ALIGNMENT

    def blocks(self, num_rows: int) -> tuple[slice, slice]:
        """Where the ids, and the weights, stand among the bytes of a step of so many rows."""
        first = self.weights_row_bytes * num_rows
        return slice(first, first + self.row_bytes * num_rows), slice(0, first)

    @property
    def slot_bytes(self) -> int:
        return self.step_bytes(self.max_tokens)
