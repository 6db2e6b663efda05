"""What a model's forward pass reads.

Legend: T tokens of the step, N rows whose logits are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from ...parallel.dp_attention import TokenLayout

PlanT = TypeVar("PlanT")


@dataclass(frozen=True)
class VisualRows:
    """What a vision tower has made of the images' positions among the rows that this rank holds between the layers: M rows
    [M] int64, and for each its embedding and the levels behind it, [M, 1 + levels, D]."""

    rows: torch.Tensor
    features: torch.Tensor

    @property
    def num_levels(self) -> int:
        return self.features.shape[1] - 1

    def replace(self, embedded: torch.Tensor) -> torch.Tensor:
        """[P, D], with the images' embeddings in their places."""
        return embedded.index_copy(0, self.rows, self.features[:, 0])

    def add(self, hidden: torch.Tensor, level: int) -> torch.Tensor:
        """[P, D], with a level added in their places."""
        return hidden.index_add(0, self.rows, self.features[:, 1 + level])


@dataclass(frozen=True)
class ForwardBatch(Generic[PlanT]):
    """Inputs of one forward pass. `kv_slots` are the slots that the new keys and values go to. Tokens of a request with
    images have other positions for the rotation, in time, height and width; None: all are turned by `positions`."""

    input_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    kv_slots: torch.Tensor  # [T] int64
    attention_plan: PlanT
    layout: TokenLayout
    sample_rows: torch.Tensor  # [N] int64, rows of the requests that sample
    sampling_req_rows: torch.Tensor  # [N] int64, their rows in the request pool
    rope_positions: torch.Tensor | None = None  # [3, T] int64, or [T] if they are the same in all three
    visual: VisualRows | None = None
