"""A rank's view of encoded images: the shared memory that the frontend keeps them in. Nothing is copied until a step reads
the rows that it computes."""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict

import torch

from .placed_image import PlacedImage

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Mapped ones take addresses, no memory of their own.
MAX_MAPPED = 64


class ImageMemory:
    """`width` is what a position has: its embedding and the levels behind it, [1 + levels, D]."""

    def __init__(self, num_levels: int, hidden_size: int) -> None:
        self.width = (1 + num_levels, hidden_size)
        self._mapped: OrderedDict[int, torch.Tensor] = OrderedDict()

    def rows(self, image: PlacedImage, first: int, last: int) -> torch.Tensor:
        """Of its tokens `[first, last)`, [last - first, 1 + levels, D]; a view."""
        if image.number not in self._mapped:
            self._mapped[image.number] = self._map(image)
            if len(self._mapped) > MAX_MAPPED:
                self._mapped.popitem(last=False)
        self._mapped.move_to_end(image.number)
        return self._mapped[image.number][first:last]

    def _map(self, image: PlacedImage) -> torch.Tensor:
        fd = os.open(image.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            memory = mmap.mmap(fd, 0)
        finally:
            os.close(fd)
        return torch.frombuffer(memory, dtype=DTYPES[image.dtype]).view(image.num_tokens, *self.width)
