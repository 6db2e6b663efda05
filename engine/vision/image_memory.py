"""A rank's view of encoded images: the shared memory that the frontend keeps them in. A step reads the rows that it
computes; nothing is kept here."""

from __future__ import annotations

import os

import torch

from .placed_image import PlacedImage

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ImageMemory:
    """`width` is what a position has: its embedding and the levels behind it, [1 + levels, D]."""

    def __init__(self, num_levels: int, hidden_size: int) -> None:
        self.width = (1 + num_levels, hidden_size)
        self._path = ""
        self._fd = -1

    def rows(self, image: PlacedImage, first: int, last: int) -> torch.Tensor:
        """Of its tokens `[first, last)`, [last - first, 1 + levels, D]."""
        rows = torch.empty(last - first, *self.width, dtype=DTYPES[image.dtype])
        row_bytes = rows[0].nbytes
        self._read(image.path, image.offset + first * row_bytes, rows.view(torch.uint8).numpy().reshape(-1).data)
        return rows

    def _read(self, path: str, offset: int, into: memoryview) -> None:
        if path != self._path:
            self.close()
            self._fd, self._path = os.open(path, os.O_RDONLY | os.O_CLOEXEC), path
        done = 0
        while done < into.nbytes:
            count = os.preadv(self._fd, [into[done:]], offset + done)
            assert count > 0, "a request's images are there until its end"
            done += count

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._path = -1, ""
