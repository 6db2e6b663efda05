"""Page tables on the device: one row per running request."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ...parallel.host_to_device import copy_to, to_device

# (row, first entry, pages as int32 bytes)
PageWrite = tuple[int, int, bytes]


class ReqToTokenPool:
    """`page_table` [max_requests + 1, max_pages] int32: entry i of a row is the page of tokens [i * size, (i + 1) * size)
    of its request.

    Entries beyond a request's pages are left over from others; they are valid page numbers that nobody may read. The
    last row belongs to no request: its first entry is a page that nobody reads, for the padding of a batch.
    """

    def __init__(self, max_requests: int, max_pages_per_request: int, scratch_page: int, device: torch.device) -> None:
        self.page_table = torch.zeros(max_requests + 1, max_pages_per_request, dtype=torch.int32, device=device)
        self.scratch_row = max_requests
        self.page_table[self.scratch_row] = scratch_page

    def write(self, writes: Sequence[PageWrite]) -> None:
        """Enter pages, all at once."""
        pages = [np.frombuffer(entries, dtype="<i4") for _, _, entries in writes]
        if len(writes) == 1:
            ((row, first, _),) = writes
            copy_to(self.page_table[row, first : first + len(pages[0])], pages[0].copy())
            return
        lengths = [len(entries) for entries in pages]
        rows = np.repeat([row for row, _, _ in writes], lengths)
        columns = np.concatenate(
            [np.arange(first, first + n) for (_, first, _), n in zip(writes, lengths, strict=True)]
        )
        packed = to_device(np.stack([rows, columns, np.concatenate(pages)]).astype(np.int64), self.page_table.device)
        self.page_table[packed[0], packed[1]] = packed[2].to(torch.int32)
