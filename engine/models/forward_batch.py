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
class ForwardBatch(Generic[PlanT]):
    """Inputs of one forward pass. `kv_slots` are the slots that the new keys and values go to."""

    input_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    kv_slots: torch.Tensor  # [T] int64
    attention_plan: PlanT
    layout: TokenLayout
    sample_rows: torch.Tensor  # [N] int64, rows of the requests that sample
    sampling_req_rows: torch.Tensor  # [N] int64, their rows in the request pool
