"""Attention of requests that bring one token each, in bfloat16, `decode_attention_bf16.cpp`.

Legend: T tokens, B requests, H query heads, G kv heads, d head width, S slots of the pool.
"""

from __future__ import annotations

import torch

from .library import has_operator, load_operators

NAME = "waybill_decode_attention_bf16"


def has_native_decode() -> bool:
    """Whether `decode_native` can run, of tensors in bfloat16."""
    return has_operator(NAME)


def decode_native(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Rows [B] of the query [T, H, d] over keys and values [S, G, d] in the first `lengths` [B] of slots [B, n]: [B, H, d].
    What a request gets has the same bits whatever requests it is computed with, and by however many threads. Requests may
    share slots, as the tokens of a prompt do."""
    num_reqs, (num_heads, width), num_kv_heads = len(rows), query.shape[1:], keys.shape[1]
    assert (
        query.dtype == keys.dtype == values.dtype == torch.bfloat16 and keys.is_contiguous() and values.is_contiguous()
    )
    out = query.new_empty(num_reqs, num_heads, width)
    # Bound to names: the tensors must live until the operator returns.
    rows, slots, lengths = (x.to(torch.int64) for x in (rows, slots, lengths))
    assert slots.stride(1) == 1 or slots.shape[1] == 1
    tensors = [query.contiguous(), keys, values, rows.contiguous(), slots, lengths.contiguous(), out]
    sizes = (num_reqs, num_heads, num_kv_heads, width, slots.shape[1], slots.stride(0))
    load_operators()[NAME](*(x.data_ptr() for x in tensors), *sizes, scale, torch.get_num_threads())
    return out
