"""Head norms, rotary positions, and keys and values to their slots, in bfloat16, `norm_rope_bf16.cpp`.

Legend: T tokens, H query heads, G kv heads, d head width, r of it that is turned, S slots of the pool.
"""

from __future__ import annotations

import torch

from .library import load_operators

NAME = "waybill_norm_rope_store_bf16"


def norm_rope_store_native(
    qkv: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    rope: tuple[torch.Tensor, torch.Tensor],
    kv_slots: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Norm (weights [d] of queries and of keys) and rotate the queries and keys of `qkv` [T, (H + 2 G) d] by cos and sin
    [T, 1, r], and write keys and values to the slots [T] int64 of the caches [S, G, d]: the queries [T, H, d]."""
    num_kv_heads, width = caches[0].shape[1:]
    num_heads = qkv.shape[1] // width - 2 * num_kv_heads
    query = qkv.new_empty(len(qkv), num_heads, width)
    # Bound to names: the tensors must live until the operator returns.
    qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
    cos, sin, kv_slots = (x.contiguous() for x in (*rope, kv_slots))
    assert kv_slots.dtype == torch.int64 and all(cache.is_contiguous() for cache in caches)
    load_operators()[NAME](
        qkv.data_ptr(),
        *((None, None) if norms is None else (weight.data_ptr() for weight in norms)),
        *(x.data_ptr() for x in (cos, sin, kv_slots, query, *caches)),
        *(len(qkv), num_heads, num_kv_heads, width, cos.shape[-1], qkv.stride(0)),
        eps,
        torch.get_num_threads(),
    )
    return query
