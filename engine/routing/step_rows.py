"""A step's routing as tensors, over bytes of whatever device holds them.

Legend: M MoE layers, n rows, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...parallel.moe.dispatch import RecordedRows
from .geometry import RouteGeometry

WEIGHT_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class StepRows:
    """Views of ids [M, n, K] and, where they are recorded, of their combine weights [M, n, K]."""

    ids: torch.Tensor
    weights: torch.Tensor | None

    @staticmethod
    def of(raw: torch.Tensor, geometry: RouteGeometry, num_rows: int) -> StepRows:
        """Over the first of the bytes `raw`; of several ranks' bytes [W, *] as [W, M, n, K]."""
        shape = (*raw.shape[:-1], geometry.num_moe_layers, num_rows, geometry.top_k)
        ids, weights = (raw[..., block] for block in geometry.blocks(num_rows))
        dtype = torch.uint8 if geometry.dtype.itemsize == 1 else torch.uint16
        return StepRows(
            ids.view(dtype).view(shape),
            weights.view(WEIGHT_DTYPES[geometry.weights_dtype]).view(shape) if geometry.has_weights else None,
        )

    def layer(self, index: int, first: int = 0) -> RecordedRows:
        """Where one layer's go, out of rows from `first` on."""
        return RecordedRows(self.ids[index], first, None if self.weights is None else self.weights[index])
