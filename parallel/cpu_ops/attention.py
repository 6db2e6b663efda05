"""Causal attention over pages in bfloat16, `attention_bf16.cpp`.

Legend: T tokens, B requests, H query heads, G kv heads, d head width, v width of values, S slots of the pool, P pages of a
request.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .library import has_operator, load_operators

NAME = "waybill_attention_bf16"


def has_native_attention() -> bool:
    """Whether `attention_native` can run, of tensors in bfloat16."""
    return has_operator(NAME)


@dataclass(frozen=True)
class Pages:
    """Where the requests of a step are: their `tables` of pages [B, P] int32, and in `rows` [3, B] int64 each one's first
    row, how many it brings, and how many positions it has with these, its last ones."""

    tables: torch.Tensor
    rows: torch.Tensor
    page_size: int


def attention_native(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: Pages,
    scale: float,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """query [T, H, d] over keys [S, G, d] and values [S, G, v]: [T, H, v]. Values may be the beginnings of keys. A row sees
    the last `window` keys up to its own, and shares its attention with its head's sink, a score [H]. What it gets has the
    same bits whatever rows and requests it is computed with, and by however many threads."""
    num_heads, width = query.shape[1:]
    num_kv_heads, value_width = values.shape[1:]
    num_reqs, num_pages = pages.tables.shape
    assert query.dtype == keys.dtype == values.dtype == torch.bfloat16 and pages.tables.dtype == torch.int32
    assert keys.is_contiguous() and pages.rows.is_contiguous()
    assert values.stride(2) == 1 and values.stride(0) == num_kv_heads * values.stride(1)
    out = query.new_empty(len(query), num_heads, value_width)
    # Bound to names: the tensors must live until the operator returns.
    query, tables = query.contiguous(), pages.tables.contiguous()
    sinks = None if sinks is None else sinks.float().contiguous()
    load_operators()[NAME](
        *(x.data_ptr() for x in (query, keys, values, tables, *pages.rows)),
        None if sinks is None else sinks.data_ptr(),
        out.data_ptr(),
        *(
            num_reqs,
            num_heads,
            num_kv_heads,
            width,
            value_width,
            values.stride(1),
            num_pages,
            pages.page_size,
            window or 0,
        ),
        scale,
        torch.get_num_threads(),
    )
    return out
