"""Which waiting requests wait a little longer, because a prefill that runs now computes a prefix of theirs.

Samples of one prompt, equal prompts, and prompts behind the same long beginning: the first one computes what they share,
the others are admitted once its pages are in the prefix cache, all at once, and compute only what is their own.

Nobody starves: a request waits only for one that is before it in the order of admission and runs already, so that one
goes first anyway; when it is retracted, aborted or done, the wait is over. Whoever does not share goes past.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..kv_cache.radix_cache import num_common_pages
from .page_manager import PageManager
from .req import AwaitedPages, Req


class SharedPrefills:
    """Compares a waiting request with the running prefills once; then it only looks how far the awaited one is."""

    def __init__(self, pages: PageManager) -> None:
        self._pages = pages

    @staticmethod
    def still_waits(req: Req) -> bool:
        """Whether the pages that it was told to wait for are still to come."""
        if req.awaited is None:
            return False
        if req.awaited.are_to_come:
            return True
        req.awaited = None
        return False

    def must_wait(self, req: Req, running: Iterable[Req]) -> bool:
        """Whether a request that was matched with the cache had better wait: one of those that run will save it at least
        half of what it has to compute."""
        if not self._pages.caches_prefixes:
            return False
        page_size = self._pages.page_size
        most = self._pages.num_reusable_tokens(req) // page_size
        to_compute = req.seqlen - req.num_cached
        fewest = len(req.held.pages) + max(1, -(-to_compute // (2 * page_size)))
        for prefill in running if fewest <= most else ():
            if self._may_bring(prefill, req):
                num_shared = min(most, num_common_pages(prefill.cache_keys, req.cache_keys, page_size))
                if num_shared >= fewest:
                    req.awaited, fewest = AwaitedPages(prefill, num_shared), num_shared + 1
        return req.awaited is not None

    def _may_bring(self, prefill: Req, req: Req) -> bool:
        """Whether it goes before `req` and has prompt tokens whose pages are still to come."""
        return (
            prefill.held.num_offered < (prefill.seqlen - 1) // self._pages.page_size
            and prefill.order < req.order
            and prefill.recv.extra_key == req.recv.extra_key
        )
