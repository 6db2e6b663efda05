"""The attention seam: a backend prepares a step once, and then serves every layer of it.

Legend: T tokens of the step, B requests, H query heads, G kv heads, d head width, S slots of the KV pool, P pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

PlanT = TypeVar("PlanT")


@dataclass(frozen=True)
class AttentionBatch:
    """A step's requests, their tokens concatenated in order.

    Request i brings `q_lens[i]` new tokens, the last of its `kv_lens[i]` positions; its pages stand in row `req_rows[i]` of
    `page_table` [R, P] int32; both are on the device. The lengths are on the host, so that planning never waits for it.
    """

    q_lens: Sequence[int]
    kv_lens: Sequence[int]
    page_table: torch.Tensor
    req_rows: torch.Tensor
    page_size: int

    def tables(self) -> torch.Tensor:
        """The requests' pages [B, P'] int32, as far as the longest needs them."""
        num_pages = -(-max(self.kv_lens, default=0) // self.page_size)
        return self.page_table[:, :num_pages][self.req_rows]


class AttentionBackend(Protocol[PlanT]):
    """Causal attention of new tokens over paged keys and values, the new ones already written."""

    def plan(self, batch: AttentionBatch) -> PlanT:
        """Everything that depends on the step alone."""
        ...

    def forward(
        self, query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: PlanT, scale: float
    ) -> torch.Tensor:
        """query [T, H, d], caches [S, G, d] -> [T, H, d]; H is a multiple of G (grouped queries)."""
        ...


def slots_of(page_table: torch.Tensor, positions: torch.Tensor, page_size: int) -> torch.Tensor:
    """KV slots of `positions` [n] for every row of `page_table` [B, P]: [B, n] int64."""
    pages = page_table[:, positions // page_size].to(torch.int64)
    return pages * page_size + positions % page_size


def slots_at(page_table: torch.Tensor, positions: torch.Tensor, page_size: int) -> torch.Tensor:
    """The same for positions [B, n] that differ from row to row."""
    pages = page_table.gather(1, positions // page_size).to(torch.int64)
    return pages * page_size + positions % page_size


def first_slots(pages: torch.Tensor, num_slots: int, page_size: int) -> torch.Tensor:
    """KV slots [num_slots] of a request's first positions; `pages` [P] int32 are its pages."""
    if page_size == 1:
        return pages[:num_slots]
    inside = torch.arange(page_size, dtype=pages.dtype, device=pages.device)
    return (pages[:, None] * page_size + inside).flatten()[:num_slots]
