"""Attention on a CPU in bfloat16 through the operator of `parallel/cpu_ops/`, over keys and values where they are; else
through torch's fused `scaled_dot_product_attention`, over keys and values gathered from their pages.

The latter: requests that bring one token (decodes) run together, in groups of similar length so that padding at most
doubles the keys that are read; the query heads that share a kv head are its query rows, so that each key is read once.
Requests that bring more (prefills) run one by one. Where a layer has a window, no key outside of it is gathered for a
decode, and a prefill runs in blocks of rows that read their own windows alone.

A sink is a key of its own before all others: heads get one more dim, in which the queries have the sink's score, that key
has one and all others zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...parallel.cpu_ops.attention import attention_native, has_native_attention
from .backend import AttentionBatch, AttentionRule, CachedTensors, LatentProjection
from .latent_sdpa import attend_latents, decode_latent, prefill_latents
from .sdpa_plan import DecodeGroup, Prefill, SdpaPlan, visible_keys

# Rows of a windowed prefill that run together, or as many as the window is wide.
MIN_BLOCK_ROWS = 256
# The fused kernels want heads of a multiple of so many dims.
WIDTH_MULTIPLE = 8


class SdpaAttention:
    def __init__(self) -> None:
        self._has_native = has_native_attention()

    def plan(self, batch: AttentionBatch) -> SdpaPlan:
        return SdpaPlan(batch, batch.tables())

    def forward(self, query: torch.Tensor, kv: CachedTensors, plan: SdpaPlan, rule: AttentionRule) -> torch.Tensor:
        if self._takes(query):
            return attention_native(query, kv["k"], kv["v"], plan.pages, rule.scale, rule.window, rule.sinks)
        decodes = plan.decodes(rule.window)
        if not decodes and len(plan.prefills) == 1:
            return prefill(query, kv, plan.prefills[0], rule)
        out = torch.empty_like(query)
        for group in decodes:
            out[group.rows] = decode(query, kv, group, rule)
        for each in plan.prefills:
            out[each.first : each.last] = prefill(query[each.first : each.last], kv, each, rule)
        return out

    def forward_latent(
        self, query: torch.Tensor, kv: CachedTensors, plan: SdpaPlan, rule: AttentionRule, projection: LatentProjection
    ) -> torch.Tensor:
        if self._takes(query):
            return attend_latents(query, kv["latent"], plan, rule.scale, projection)
        out = query.new_empty(*query.shape[:2], projection.value_width)
        for group in plan.decodes(None):
            out[group.rows] = decode_latent(query, kv["latent"], group, rule.scale, projection)
        prefill_latents(query, kv["latent"], plan.prefills, rule.scale, projection, out)
        return out

    def _takes(self, query: torch.Tensor) -> bool:
        """Whether it is the operator's."""
        return self._has_native and query.device.type == "cpu" and query.dtype == torch.bfloat16


def decode(query: torch.Tensor, kv: CachedTensors, group: DecodeGroup, rule: AttentionRule) -> torch.Tensor:
    """Results of the group's own rows [B', H, d]."""
    num_reqs, (num_kv_heads, width) = len(group.rows), kv["k"].shape[1:]
    shape = (num_reqs, group.num_keys, num_kv_heads, width)
    keys, values = (kv[name].index_select(0, group.slots).view(shape).transpose(1, 2) for name in ("k", "v"))
    # [B', G, H / G, d]: heads of one group are adjacent, and become its query rows.
    rows = query.index_select(0, group.rows).view(num_reqs, num_kv_heads, -1, width)
    mask = group.mask
    if rule.sinks is not None:
        scores = rule.sinks.view(num_kv_heads, -1).expand(num_reqs, -1, -1)
        rows, keys, values = with_sink(rows, keys, values, scores, rule.scale)
        mask = None if mask is None else F.pad(mask, (1, 0), value=True)
    result = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=rule.scale)
    return result[..., :width].reshape(num_reqs, -1, width)


def prefill(query: torch.Tensor, kv: CachedTensors, request: Prefill, rule: AttentionRule) -> torch.Tensor:
    """Results of a request's own rows: query [n, H, d] -> [n, H, d]."""
    num_rows, num_keys = len(query), len(request.slots)
    if rule.window is None or rule.window >= num_keys:
        return attend(query, kv, request.slots, rule, None)
    out = torch.empty_like(query)
    for first in range(0, num_rows, max(rule.window, MIN_BLOCK_ROWS)):
        last = min(first + max(rule.window, MIN_BLOCK_ROWS), num_rows)
        end = num_keys - num_rows + last
        begin = max(0, end - (last - first) - rule.window + 1)
        out[first:last] = attend(query[first:last], kv, request.slots[begin:end], rule, rule.window)
    return out


def attend(
    query: torch.Tensor, kv: CachedTensors, slots: torch.Tensor, rule: AttentionRule, window: int | None
) -> torch.Tensor:
    """The last n of some positions, query [n, H, d], to all of these, whose KV is in `slots`: [n, H, d]."""
    width = query.shape[-1]
    rows = query.transpose(0, 1)[None]
    keys, values = (kv[name].index_select(0, slots).transpose(0, 1)[None] for name in ("k", "v"))
    num_sinks = 0
    if rule.sinks is not None:
        scores = rule.sinks[None, :, None].expand(1, -1, rows.shape[2])
        rows, keys, values = with_sink(rows, keys, values, scores, rule.scale)
        num_sinks = 1
    if window is not None and rows.is_cuda:
        # There the fused kernels take a mask or shared kv heads, not both.
        keys, values = (x.repeat_interleave(rows.shape[1] // x.shape[1], dim=1) for x in (keys, values))
    num_rows, num_keys = rows.shape[2], keys.shape[2]
    is_causal = window is None and num_rows == num_keys
    mask = None if is_causal else visible_keys(num_rows, num_keys, window, num_sinks, rows.device)
    result = F.scaled_dot_product_attention(
        rows,
        keys,
        values,
        attn_mask=mask,
        is_causal=is_causal,
        scale=rule.scale,
        enable_gqa=rows.shape[1] != keys.shape[1],
    )
    return result[0, ..., :width].transpose(0, 1)


def with_sink(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query [B, H, n, d], keys and values [B, G, m, d] with one more dim each, padded, and one more key before the others;
    `scores` [B, H, n] are the sinks'."""
    extra = WIDTH_MULTIPLE - query.shape[-1] % WIDTH_MULTIPLE
    query = F.pad(query, (0, extra))
    query[..., -extra] = scores / scale
    keys, values = F.pad(keys, (0, extra, 1, 0)), F.pad(values, (0, extra, 1, 0))
    keys[..., 0, -extra] = 1.0
    return query, keys, values
