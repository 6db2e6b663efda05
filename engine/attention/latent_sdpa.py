"""Attention over latents (MLA, DeepSeek-V2 2024), see `LatentProjection`: on a CPU in bfloat16 through the operator of
`parallel/cpu_ops/`, all in the absorbed form, so that a token's result is the same as a decode and in a prefill; else
through torch's fused `scaled_dot_product_attention`, decodes in the absorbed form and prefills in the plain one.

Legend: T tokens of the step, H query heads, S slots of the KV pool, L width of a latent, R width of the rotated key, N
width of a head's other key columns, V width of a head's values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ...parallel.cpu_ops.attention import attention_native
from .backend import LatentProjection
from .sdpa_plan import DecodeGroup, Prefill, SdpaPlan, visible_keys

# Of keys and values that are made of latents at once.
MAX_EXPANDED_BYTES = 256 << 20


def attend_latents(
    query: torch.Tensor, cache: torch.Tensor, plan: SdpaPlan, scale: float, projection: LatentProjection
) -> torch.Tensor:
    """query [T, H, N + R] over the step's requests, by the operator: [T, H, V]. A row's bits depend on no other row."""
    content, rope = query.tensor_split([projection.key_width], dim=-1)
    rows = torch.cat((projection.absorb(content), rope), dim=-1)
    keys = cache[:, None]
    values = keys[..., : cache.shape[1] - rope.shape[2]]
    return projection.extract(attention_native(rows, keys, values, plan.pages, scale))


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


def prefill_latents(
    query: torch.Tensor,
    cache: torch.Tensor,
    requests: Sequence[Prefill],
    scale: float,
    projection: LatentProjection,
    out: torch.Tensor,
) -> None:
    """The requests' own rows of `out` [T, H, V] in the plain form: keys and values of all that they see, expanded for as
    many requests at once, and for as many heads of a longer one, as there is memory set aside for. Requests and heads know
    nothing of each other, so that changes no result."""
    key_bytes = query.element_size() * (projection.key_width + projection.value_width + 2 * query.shape[2])
    most = max(1, MAX_EXPANDED_BYTES // key_bytes)
    group: list[Prefill] = []
    for request in requests:
        if group and (sum(len(each.slots) for each in group) + len(request.slots)) * query.shape[1] > most:
            prefill_group(query, cache, group, most, scale, projection, out)
            group = []
        group.append(request)
    if group:
        prefill_group(query, cache, group, most, scale, projection, out)


def prefill_group(
    query: torch.Tensor,
    cache: torch.Tensor,
    group: Sequence[Prefill],
    most: int,
    scale: float,
    projection: LatentProjection,
    out: torch.Tensor,
) -> None:
    """Those of some requests; at most `most` keys, of all heads together, are expanded at once."""
    num_heads, rope_width = query.shape[1], query.shape[2] - projection.key_width
    lengths = [len(request.slots) for request in group]
    slots = torch.cat([request.slots for request in group]) if len(group) > 1 else group[0].slots
    latent, rope = cache.index_select(0, slots).tensor_split([-rope_width], dim=1)
    num_at_once = max(1, most // len(slots))
    for first in range(0, num_heads, num_at_once):
        heads = slice(first, min(first + num_at_once, num_heads))
        keys, values = projection.expand(latent, heads)
        keys = torch.cat((keys, rope[:, None].expand(-1, keys.shape[1], -1)), dim=-1)
        for request, own_keys, own_values in zip(group, keys.split(lengths), values.split(lengths), strict=True):
            rows = query[request.first : request.last, heads]
            out[request.first : request.last, heads] = attend_expanded(rows, own_keys, own_values, scale)


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
