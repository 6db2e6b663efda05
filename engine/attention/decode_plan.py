"""What a step of decodes reads on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DecodePlan:
    """Where each request's pages stand [B], and its number of keys [B], on the device."""

    page_table: torch.Tensor
    req_rows: torch.Tensor
    kv_lens: torch.Tensor
    page_size: int
