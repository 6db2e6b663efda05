"""The pages of running requests: prefix cache and page pool behind one door.

    free + cached + private = total        (checked by `check_integrity` whenever the engine is idle)

A request's pages are private until they are full; full ones are offered to the prefix cache as they fill, so that
finishing costs an unlock and one bulk free, whatever the request's length.
"""

from __future__ import annotations

from ..kv_cache.page_pool import PagePool, Pages, pages_for
from ..kv_cache.radix_cache import NullPrefixCache, RadixCache
from ..plan import TOKEN_BYTES
from .req import HeldPages, Req

# Share of the pool that is evicted beyond what lacks.
EVICTION_SLACK = 64


class PageManager:
    """Gives pages to requests and takes them back. Knows nothing of steps, ranks or tensors."""

    def __init__(self, num_pages: int, page_size: int, enable_prefix_cache: bool) -> None:
        self.page_size = page_size
        self.caches_prefixes = enable_prefix_cache
        self.pool = PagePool(num_pages, page_size)
        self.cache: RadixCache | NullPrefixCache = (
            RadixCache(page_size) if enable_prefix_cache else NullPrefixCache(page_size)
        )

    @property
    def num_available(self) -> int:
        """Pages that can be had without retracting anybody."""
        return self.pool.num_free + self.cache.num_evictable_pages

    @staticmethod
    def num_reusable_tokens(req: Req) -> int:
        """Most tokens that a request may have from the cache: at least one is left to compute, and with prompt
        log-probabilities every position that scores one."""
        limit = req.seqlen - 1
        if req.options.returns_prompt_logprobs:
            limit = min(limit, max(0, max(req.options.logprob_start_len, req.num_scored) - 1))
        return limit

    def match(self, req: Req) -> None:
        """Start a request on its longest cached prefix."""
        match = self.cache.match_prefix(bytes(req.cache_keys), req.recv.extra_key, self.num_reusable_tokens(req))
        self.cache.lock(match.node)
        req.held = HeldPages(match.node, match.pages, num_offered=len(match.pages))
        req.num_cached = req.num_scheduled = req.num_committed = len(match.pages) * self.page_size

    def pages_missing(self, req: Req, num_tokens: int) -> int:
        """Pages that the request lacks to hold `num_tokens` more."""
        return max(0, pages_for(req.num_scheduled + num_tokens, self.page_size) - len(req.held.pages))

    def take(self, num_pages: int) -> Pages[int] | None:
        """`num_pages` from the pool, evicting cached ones as far as needed; None (and nothing evicted) if they are not
        to be had."""
        if num_pages > self.num_available:
            return None
        lacking = num_pages - self.pool.num_free
        if lacking > 0:
            # Some more than lacks: looking for what to evict costs a pass over the tree.
            self.pool.free(self.cache.evict(lacking + self.pool.num_pages // EVICTION_SLACK))
        pages = self.pool.allocate(num_pages)
        assert pages is not None, "evictable pages were counted wrong"
        return pages

    def offer_full_pages(self, req: Req) -> None:
        """Put pages that committed tokens have filled into the prefix cache."""
        held = req.held
        assert held.node is not None
        first, end = held.num_offered, req.num_committed // self.page_size
        if first == end:
            return
        page_bytes = self.page_size * TOKEN_BYTES
        tokens = bytes(req.cache_keys[first * page_bytes : end * page_bytes])
        held.node, duplicates = self.cache.extend(held.node, tokens, held.pages[first:end])
        held.duplicates.extend(duplicates)
        held.num_offered = end

    def release(self, req: Req) -> None:
        """Give everything back; what the cache took stays there, evictable."""
        held = req.held
        assert held.node is not None
        self.cache.unlock(held.node)
        self.pool.free(held.pages[held.num_offered :])
        self.pool.free(held.duplicates)

    def flush(self) -> None:
        """Drop every cached page; nothing may be running."""
        self.pool.free(self.cache.flush())

    def state(self) -> dict[str, int | float | str]:
        """Where the pages are."""
        return {
            "num_pages": self.pool.num_pages,
            "num_free_pages": self.pool.num_free,
            "num_cached_pages": self.cache.num_cached_pages,
        }

    def check_integrity(self) -> None:
        """At idle: every page is free or cached, and the tree is consistent."""
        self.cache.check_integrity()
        self.pool.check_integrity()
        total = self.pool.num_free + self.cache.num_cached_pages
        assert total == self.pool.num_pages, f"{self.pool.num_pages - total} pages are leaked"
