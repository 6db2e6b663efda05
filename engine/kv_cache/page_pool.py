"""Free pages of the KV pool. Pure bookkeeping: it knows neither tokens nor tensors."""

from __future__ import annotations

from array import array

# A run of page numbers: 32-bit, so that taking, giving back and sending any number of pages is a copy of memory.
Pages = array
PAGE_TYPECODE = "i"


def no_pages() -> Pages[int]:
    return array(PAGE_TYPECODE)


class PagePool:
    """Pages `0 .. num_pages - 1`, each held by at most one owner. Taking and giving back are bulk operations."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        # A stack, so that pages used last, warm in caches, are used next.
        self._free = array(PAGE_TYPECODE, range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, num_pages: int) -> Pages[int] | None:
        """All of `num_pages`, or None."""
        if num_pages > len(self._free):
            return None
        first = len(self._free) - num_pages
        pages = self._free[first:]
        del self._free[first:]
        return pages

    def free(self, pages: Pages[int]) -> None:
        """Give pages back; a page given back twice is found by `check_integrity`, too many at once."""
        self._free.extend(pages)
        assert len(self._free) <= self.num_pages, "more pages were freed than there are"

    def check_integrity(self) -> None:
        """Every free page is a page, and is free once. Costs a pass over the pool."""
        assert len(set(self._free)) == len(self._free), "a page was freed twice"
        assert all(0 <= page < self.num_pages for page in self._free), "a page of another pool was freed"


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that hold `num_tokens`."""
    return -(-num_tokens // page_size)
