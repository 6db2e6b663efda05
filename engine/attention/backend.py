"""The attention seam: a backend prepares a step once, and then serves every layer of it.

Legend: T tokens of the step, B requests, H query heads, G kv heads, d head width, S slots of the KV pool, P pages; of
latents: L width of a latent, R width of the rotated key that all heads share, N width of a head's other key columns, V
width of a head's values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch

PlanT = TypeVar("PlanT")
# One layer's cache by the names of the model's `KVTensorSpec`s: "k" and "v" [S, G, d], or "latent" [S, L + R].
CachedTensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class AttentionRule:
    """What attention computes in a layer: scores are scaled, a query sees the last `window` keys up to its own (None: all),
    and shares its attention with its head's sink, a score [H] without a value (None: there are none)."""

    scale: float
    window: int | None = None
    sinks: torch.Tensor | None = None


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


class LatentProjection(Protocol):
    """What makes keys and values of a latent, for this rank's heads: W_UK [H, N, L] and W_UV [H, V, L] (DeepSeek-V2, 2024).

    Scores are q W_UK c = (q W_UK) c, and outputs sum_i p_i W_UV c_i = W_UV (sum_i p_i c_i): so attention can run over keys
    and values that were expanded (plain), or over the latents themselves, which all heads share (absorbed).
    """

    @property
    def key_width(self) -> int:
        """N."""
        ...

    @property
    def value_width(self) -> int:
        """V."""
        ...

    def expand(self, latent: torch.Tensor, heads: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """[n, L] -> keys [n, h, N] and values [n, h, V] of some of the heads."""
        ...

    def absorb(self, query: torch.Tensor) -> torch.Tensor:
        """[n, H, N] -> [n, H, L], queries for latents."""
        ...

    def extract(self, attended: torch.Tensor) -> torch.Tensor:
        """[n, H, L], weighted sums of latents, -> values [n, H, V]."""
        ...


class AttentionBackend(Protocol[PlanT]):
    """Causal attention of new tokens over the cached tensors of their requests, those of the new ones already written."""

    def plan(self, batch: AttentionBatch) -> PlanT:
        """Everything that depends on the step alone."""
        ...

    def forward(self, query: torch.Tensor, kv: CachedTensors, plan: PlanT, rule: AttentionRule) -> torch.Tensor:
        """query [T, H, d] -> [T, H, d]; H is a multiple of the G heads that are cached (grouped queries)."""
        ...

    def forward_latent(
        self, query: torch.Tensor, kv: CachedTensors, plan: PlanT, rule: AttentionRule, projection: LatentProjection
    ) -> torch.Tensor:
        """query [T, H, N + R] -> [T, H, V], over cached latents; the rule has neither window nor sinks."""
        ...


@runtime_checkable
class GraphAttentionBackend(AttentionBackend[PlanT], Protocol[PlanT]):
    """A backend whose decode steps a CUDA graph can record."""

    def plan_graph(
        self, page_table: torch.Tensor, req_rows: torch.Tensor, kv_lens: torch.Tensor, page_size: int
    ) -> PlanT:
        """The plan of a decode step of B requests. Rows [B] and lengths [B] int32 are read on the device, at the addresses
        that they have now, whenever the graph is replayed."""
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
