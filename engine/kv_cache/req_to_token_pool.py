"""Page tables on the device: one row per running request."""

from __future__ import annotations

import numpy as np
import torch


class ReqToTokenPool:
    """`page_table` [max_requests, max_pages] int32: entry i of a row holds the page of tokens [i * size, (i + 1) * size).

    Entries beyond a request's pages are left over from others; they are valid page numbers that nobody may read.
    """

    def __init__(self, max_requests: int, max_pages_per_request: int, device: torch.device) -> None:
        self.page_table = torch.zeros(max_requests, max_pages_per_request, dtype=torch.int32, device=device)

    def write(self, row: int, first_page: int, pages: bytes) -> None:
        """Enter `pages`, int32 bytes, from entry `first_page` on."""
        entries = torch.from_numpy(np.frombuffer(pages, dtype="<i4").copy())
        self.page_table[row, first_page : first_page + len(entries)].copy_(entries, non_blocking=True)
