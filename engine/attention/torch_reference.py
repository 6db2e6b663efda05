"""The slow twin: attention as its definition reads, request by request, softmax in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .backend import AttentionBatch, AttentionRule, CachedTensors, LatentProjection, slots_of


@dataclass(frozen=True)
class ReferencePlan:
    """Per request: rows [first, last) of the step, KV slots [n], and how far behind each row each key is [rows, n]."""

    requests: list[tuple[int, int, torch.Tensor, torch.Tensor]]


class TorchReferenceAttention:
    def plan(self, batch: AttentionBatch) -> ReferencePlan:
        requests = []
        first = 0
        tables = batch.tables()
        for i, (q_len, kv_len) in enumerate(zip(batch.q_lens, batch.kv_lens, strict=True)):
            positions = torch.arange(kv_len, device=tables.device)
            slots = slots_of(tables[i : i + 1], positions, batch.page_size)[0]
            distance = positions[kv_len - q_len :, None] - positions[None, :]
            requests.append((first, first + q_len, slots, distance))
            first += q_len
        return ReferencePlan(requests)

    def forward(self, query: torch.Tensor, kv: CachedTensors, plan: ReferencePlan, rule: AttentionRule) -> torch.Tensor:
        k_cache, v_cache = kv["k"], kv["v"]
        out = torch.empty_like(query)
        num_shared = query.shape[1] // k_cache.shape[1]
        for first, last, slots, distance in plan.requests:
            keys = k_cache[slots].repeat_interleave(num_shared, dim=1)
            values = v_cache[slots].repeat_interleave(num_shared, dim=1)
            out[first:last] = attend(query[first:last], keys, values, distance, rule)
        return out

    def forward_latent(
        self,
        query: torch.Tensor,
        kv: CachedTensors,
        plan: ReferencePlan,
        rule: AttentionRule,
        projection: LatentProjection,
    ) -> torch.Tensor:
        """In the plain form, decodes too."""
        num_heads, rope_width = query.shape[1], query.shape[2] - projection.key_width
        out = query.new_empty(len(query), num_heads, projection.value_width)
        for first, last, slots, distance in plan.requests:
            latent, rope = kv["latent"][slots].tensor_split([-rope_width], dim=1)
            keys, values = projection.expand(latent, slice(0, num_heads))
            keys = torch.cat((keys, rope[:, None].expand(-1, num_heads, -1)), dim=-1)
            out[first:last] = attend(query[first:last], keys, values, distance, rule)
        return out


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, distance: torch.Tensor, rule: AttentionRule
) -> torch.Tensor:
    """One request: query [n, H, d], keys [k, H, d], values [k, H, V], and how far behind each row each key is [n, k], to
    [n, H, V]."""
    scores = torch.einsum("qhd,khd->hqk", query.float(), keys.float()) * rule.scale
    hidden = distance < 0 if rule.window is None else (distance < 0) | (distance >= rule.window)
    scores = scores.masked_fill(hidden, float("-inf"))
    if rule.sinks is not None:
        sinks = rule.sinks.float()[:, None, None].expand(-1, len(query), 1)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : len(keys)]
    return torch.einsum("hqk,khd->qhd", weights, values.float()).to(query.dtype)
