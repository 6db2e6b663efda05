"""Attention through torch's fused `scaled_dot_product_attention`, over keys and values gathered from their pages.

Requests that bring one token (decodes) run together, in groups of similar length so that padding at most doubles the
keys that are read; the query heads that share a kv head are its query rows, so that each key is read once. Requests that
bring more (prefills) run one by one.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...parallel.host_to_device import to_device
from .backend import AttentionBatch, CachedTensors, first_slots, slots_at, slots_of


@dataclass(frozen=True)
class DecodeGroup:
    """Decodes of similar length: their rows [B'], KV slots [B' * n], and mask [B', 1, 1, n] (None: nothing is padded)."""

    rows: torch.Tensor
    slots: torch.Tensor
    num_keys: int
    mask: torch.Tensor | None


@dataclass(frozen=True)
class Prefill:
    """One request's rows [first, last) and KV slots [n]."""

    first: int
    last: int
    slots: torch.Tensor


@dataclass(frozen=True)
class SdpaPlan:
    decodes: list[DecodeGroup]
    prefills: list[Prefill]


class SdpaAttention:
    def plan(self, batch: AttentionBatch) -> SdpaPlan:
        groups: dict[int, list[int]] = defaultdict(list)
        prefills: list[Prefill] = []
        firsts: list[int] = []
        first = 0
        tables = batch.tables()
        for i, (q_len, kv_len) in enumerate(zip(batch.q_lens, batch.kv_lens, strict=True)):
            firsts.append(first)
            if q_len == 1:
                groups[kv_len.bit_length()].append(i)
            else:
                prefills.append(Prefill(first, first + q_len, first_slots(tables[i], kv_len, batch.page_size)))
            first += q_len
        decodes = [self._plan_group(batch, tables, members, firsts) for members in groups.values()]
        return SdpaPlan(decodes, prefills)

    @staticmethod
    def _plan_group(batch: AttentionBatch, tables: torch.Tensor, members: list[int], firsts: list[int]) -> DecodeGroup:
        device = tables.device
        lengths = [batch.kv_lens[i] for i in members]
        num_keys = max(lengths)
        positions = torch.arange(num_keys, device=device)
        table = tables[to_device(members, device)]
        rows = to_device([firsts[i] for i in members], device)
        if min(lengths) == num_keys:
            return DecodeGroup(rows, slots_of(table, positions, batch.page_size).flatten(), num_keys, None)
        ends = to_device(lengths, device)[:, None]
        mask = (positions[None, :] < ends)[:, None, None, :]
        # Padding repeats a request's own last key: beyond it lies what others left, and no mask hides NaN.
        slots = slots_at(table, torch.minimum(positions[None, :], ends - 1), batch.page_size)
        return DecodeGroup(rows, slots.flatten(), num_keys, mask)

    def forward(self, query: torch.Tensor, kv: CachedTensors, plan: SdpaPlan, scale: float) -> torch.Tensor:
        k_cache, v_cache = kv["k"], kv["v"]
        if not plan.decodes and len(plan.prefills) == 1:
            return self._prefill(query, k_cache, v_cache, plan.prefills[0], scale)
        out = torch.empty_like(query)
        for group in plan.decodes:
            self._decode(query, k_cache, v_cache, group, scale, out)
        for prefill in plan.prefills:
            out[prefill.first : prefill.last] = self._prefill(query, k_cache, v_cache, prefill, scale)
        return out

    @staticmethod
    def _decode(
        query: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        group: DecodeGroup,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        num_reqs, num_kv_heads, width = len(group.rows), k_cache.shape[1], k_cache.shape[2]
        shape = (num_reqs, group.num_keys, num_kv_heads, width)
        keys = k_cache.index_select(0, group.slots).view(shape).transpose(1, 2)
        values = v_cache.index_select(0, group.slots).view(shape).transpose(1, 2)
        # [B', G, H / G, d]: heads of one group are adjacent, and become its query rows.
        rows = query.index_select(0, group.rows).view(num_reqs, num_kv_heads, -1, width)
        result = F.scaled_dot_product_attention(rows, keys, values, attn_mask=group.mask, scale=scale)
        out[group.rows] = result.reshape(num_reqs, -1, width)

    @staticmethod
    def _prefill(
        query: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        prefill: Prefill,
        scale: float,
    ) -> torch.Tensor:
        """Results of the prefill's own rows [n, H, d]."""
        rows = query[prefill.first : prefill.last].transpose(0, 1)[None]
        keys = k_cache.index_select(0, prefill.slots).transpose(0, 1)[None]
        values = v_cache.index_select(0, prefill.slots).transpose(0, 1)[None]
        num_rows, num_keys = rows.shape[2], keys.shape[2]
        if num_rows == num_keys:
            result = F.scaled_dot_product_attention(
                rows, keys, values, is_causal=True, scale=scale, enable_gqa=rows.shape[1] != keys.shape[1]
            )
        else:
            visible = causal_mask(num_rows, num_keys, rows.device)
            result = F.scaled_dot_product_attention(
                rows, keys, values, attn_mask=visible, scale=scale, enable_gqa=rows.shape[1] != keys.shape[1]
            )
        return result[0].transpose(0, 1)


def causal_mask(num_rows: int, num_keys: int, device: torch.device) -> torch.Tensor:
    """What each of the last `num_rows` of `num_keys` positions may see: [num_rows, num_keys]."""
    if device.type == "cpu":
        return torch.ones(num_rows, num_keys, dtype=torch.bool).tril_(num_keys - num_rows)
    # A bias that the fused kernels know, so that they need no mask in memory. Importing it imports torch's compiler, which
    # is a third of what a rank imports.
    from torch.nn.attention.bias import causal_lower_right  # noqa: PLC0415

    return causal_lower_right(num_rows, num_keys)
