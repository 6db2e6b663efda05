"""Attention through torch's fused `scaled_dot_product_attention`, over keys and values gathered from their pages.

Requests that bring one token (decodes) run together, in groups of similar length so that padding at most doubles the
keys that are read; the query heads that share a kv head are its query rows, so that each key is read once. Requests that
bring more (prefills) run one by one. Where a layer has a window, no key outside of it is gathered for a decode, and a
prefill runs in blocks of rows that read their own windows alone. Over latents, decodes run in the absorbed form and
prefills in the plain one.

A sink is a key of its own before all others: heads get one more dim, in which the queries have the sink's score, that key
has one and all others zero.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ...parallel.host_to_device import to_device
from .backend import (
    AttentionBatch,
    AttentionRule,
    CachedTensors,
    LatentProjection,
    first_slots,
    slots_at,
    slots_of,
)

# Rows of a windowed prefill that run together, or as many as the window is wide.
MIN_BLOCK_ROWS = 256
# The fused kernels want heads of a multiple of so many dims.
WIDTH_MULTIPLE = 8
# Of keys and values that are made of latents at once.
MAX_EXPANDED_BYTES = 256 << 20


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
    """`firsts` are the requests' first rows. Groups of decodes are made once for every window that a layer asks for."""

    batch: AttentionBatch
    tables: torch.Tensor
    firsts: list[int]
    prefills: list[Prefill]
    groups: dict[int | None, list[DecodeGroup]] = field(default_factory=dict)

    def decodes(self, window: int | None) -> list[DecodeGroup]:
        if window not in self.groups:
            members: dict[int, list[int]] = defaultdict(list)
            for i, (q_len, kv_len) in enumerate(zip(self.batch.q_lens, self.batch.kv_lens, strict=True)):
                if q_len == 1:
                    members[min(kv_len, window or kv_len).bit_length()].append(i)
            self.groups[window] = [self._group(each, window) for each in members.values()]
        return self.groups[window]

    def _group(self, members: list[int], window: int | None) -> DecodeGroup:
        device, page_size = self.tables.device, self.batch.page_size
        ends = [self.batch.kv_lens[i] for i in members]
        lengths = [min(end, window or end) for end in ends]
        num_keys = max(lengths)
        positions = torch.arange(num_keys, device=device)
        table = self.tables[to_device(members, device)]
        rows = to_device([self.firsts[i] for i in members], device)
        if min(lengths) == max(ends):
            return DecodeGroup(rows, slots_of(table, positions, page_size).flatten(), num_keys, None)
        begins = to_device([end - length for end, length in zip(ends, lengths, strict=True)], device)[:, None]
        last = to_device(ends, device)[:, None] - 1
        wanted = begins + positions
        mask = None if min(lengths) == num_keys else (wanted <= last)[:, None, None, :]
        # Padding repeats a request's own last key: beyond it lies what others left, and no mask hides NaN.
        slots = slots_at(table, torch.minimum(wanted, last), page_size)
        return DecodeGroup(rows, slots.flatten(), num_keys, mask)


class SdpaAttention:
    def plan(self, batch: AttentionBatch) -> SdpaPlan:
        prefills: list[Prefill] = []
        firsts: list[int] = []
        first = 0
        tables = batch.tables()
        for i, (q_len, kv_len) in enumerate(zip(batch.q_lens, batch.kv_lens, strict=True)):
            firsts.append(first)
            if q_len != 1:
                prefills.append(Prefill(first, first + q_len, first_slots(tables[i], kv_len, batch.page_size)))
            first += q_len
        return SdpaPlan(batch, tables, firsts, prefills)

    def forward(self, query: torch.Tensor, kv: CachedTensors, plan: SdpaPlan, rule: AttentionRule) -> torch.Tensor:
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
        out = query.new_empty(*query.shape[:2], projection.value_width)
        for group in plan.decodes(None):
            out[group.rows] = decode_latent(query, kv["latent"], group, rule.scale, projection)
        for each in plan.prefills:
            prefill_latent(query, kv["latent"], each, rule.scale, projection, out)
        return out


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


def visible_keys(
    num_rows: int, num_keys: int, window: int | None, num_sinks: int, device: torch.device
) -> torch.Tensor:
    """What each of the last `num_rows` of `num_keys` positions may see: [num_rows, num_keys]. The first `num_sinks` are
    seen by all."""
    if device.type != "cpu" and window is None:
        # A bias that the fused kernels know, so that they need no mask in memory. Importing it imports torch's compiler,
        # which is a third of what a rank imports.
        from torch.nn.attention.bias import causal_lower_right  # noqa: PLC0415

        return causal_lower_right(num_rows, num_keys)
    visible = torch.ones(num_rows, num_keys, dtype=torch.bool, device=device).tril_(num_keys - num_rows)
    if window is not None:
        visible.triu_(num_keys - num_rows - window + 1)
        visible[:, :num_sinks] = True
    return visible


def decode_latent(
    query: torch.Tensor, cache: torch.Tensor, group: DecodeGroup, scale: float, projection: LatentProjection
) -> torch.Tensor:
    """Results of the group's own rows [B', H, V], in the absorbed form: latents and rotated keys are the one head of keys,
    and its values too, of which the rotated columns are dropped. So they are gathered once, and read by one product for
    all query heads."""
    content, rope = query.index_select(0, group.rows).tensor_split([projection.key_width], dim=-1)
    rows = torch.cat((projection.absorb(content), rope), dim=-1)
    cached = cache.index_select(0, group.slots).view(len(rows), 1, group.num_keys, -1)
    attended = F.scaled_dot_product_attention(rows[:, None], cached, cached, attn_mask=group.mask, scale=scale)
    return projection.extract(attended[:, 0, :, : -rope.shape[-1]])


def prefill_latent(
    query: torch.Tensor,
    cache: torch.Tensor,
    request: Prefill,
    scale: float,
    projection: LatentProjection,
    out: torch.Tensor,
) -> None:
    """A request's own rows of `out` [T, H, V] in the plain form: keys and values of all that it sees, expanded for as many
    heads at once as there is memory set aside for. Heads know nothing of each other, so that changes no result."""
    num_heads, rope_width = query.shape[1], query.shape[2] - projection.key_width
    latent, rope = cache.index_select(0, request.slots).tensor_split([-rope_width], dim=1)
    key_bytes = query.element_size() * (projection.key_width + projection.value_width + 2 * query.shape[2])
    num_at_once = max(1, MAX_EXPANDED_BYTES // (key_bytes * len(latent)))
    for first in range(0, num_heads, num_at_once):
        heads = slice(first, min(first + num_at_once, num_heads))
        keys, values = projection.expand(latent, heads)
        keys = torch.cat((keys, rope[:, None].expand(-1, keys.shape[1], -1)), dim=-1)
        rows = query[request.first : request.last, heads]
        out[request.first : request.last, heads] = attend_expanded(rows, keys, values, scale)


def attend_expanded(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """The last n of a request's k positions: query [n, H, N + R], keys [k, H, N + R], values [k, H, V] -> [n, H, V]."""
    (num_rows, _, width), (num_keys, _, value_width) = query.shape, values.shape
    # Fused kernels know one width alone; columns of zeros change neither scores nor sums.
    if value_width < width:
        values = F.pad(values, (0, width - value_width))
    elif value_width > width:
        query, keys = (F.pad(x, (0, value_width - width)) for x in (query, keys))
    is_causal = num_rows == num_keys
    result = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        attn_mask=None if is_causal else visible_keys(num_rows, num_keys, None, 0, query.device),
        is_causal=is_causal,
        scale=scale,
    )
    return result[0, ..., :value_width].transpose(0, 1)
