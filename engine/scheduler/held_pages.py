"""The pages of one running request; a waiting one holds none."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..kv_cache.page_pool import Pages, no_pages
from ..kv_cache.radix_cache import Node


@dataclass(slots=True)
class HeldPages:
    """`node`: how far the prefix cache knows the request's tokens, locked for it. `PageManager` alone changes what is here,
    apart from new pages, which the planner adds."""

    node: Node | None = None
    pages: Pages[int] = field(default_factory=no_pages)
    # Pages [0, num_offered) are full and were offered to the prefix cache; those it did not take are `duplicates`.
    num_offered: int = 0
    duplicates: Pages[int] = field(default_factory=no_pages)
