"""The shape of one step's routing: what the ring, the ledger and the wire agree on."""

from __future__ import annotations

import msgspec
import numpy as np

MAX_UINT8_EXPERTS = 256


class RouteGeometry(msgspec.Struct, frozen=True, array_like=True):
    """Shape of one step's routing. `layer_ids` are the layers of the model that route, in order."""

    layer_ids: tuple[int, ...]
    num_layers_total: int
    max_tokens: int
    top_k: int
    num_experts: int

    @property
    def num_moe_layers(self) -> int:
        return len(self.layer_ids)

    @property
    def dtype(self) -> np.dtype[np.uint8] | np.dtype[np.uint16]:
        """The narrowest type that holds every expert id."""
        return np.dtype(np.uint8) if self.num_experts <= MAX_UINT8_EXPERTS else np.dtype("<u2")

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's routing."""
        return self.num_moe_layers * self.top_k * self.dtype.itemsize

    @property
    def slot_bytes(self) -> int:
        return self.row_bytes * self.max_tokens
