"""Page tables on the device: one row per running request."""

from __future__ import annotations

import torch


class ReqToTokenPool:
    """`page_table` [max_requests, max_pages] int32: entry i of a row holds the page of tokens [i * size, (i + 1) * size).

    Entries beyond a request's pages are left over from others; they are valid page numbers that nobody may read.
    """

    def __init__(self, max_requests: int, max_pages_per_request: int, device: torch.device) -> None:
        self.page_table = torch.zeros(max_requests, max_pages_per_request, dtype=torch.int32, device=device)

    def write(self, row: int, first_page: int, pages: list[int]) -> None:
        """Enter `pages` from entry `first_page` on."""
        entries = torch.tensor(pages, dtype=torch.int32)
        self.page_table[row, first_page : first_page + len(pages)].copy_(entries, non_blocking=True)
