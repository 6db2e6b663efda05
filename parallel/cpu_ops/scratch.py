"""Memory of operators that stays for their next call.

What an operator frees goes back to the kernel, where it is large, and the next call's is cleared page by page as it is
written to. In a long prefill that is a good part of what experts take.
"""

from __future__ import annotations

import math
import threading

import torch

from ..huge_pages import prefer_huge_pages

ALIGNMENT = 64


class Scratch(threading.local):
    """Of each thread its own, as large as the largest call needed."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def tensors(self, *wanted: tuple[tuple[int, ...], torch.dtype]) -> list[torch.Tensor]:
        """Uninitialised tensors of these shapes and dtypes, all of which the next call may overwrite."""
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in wanted]
        places = [0]
        for size in sizes:
            places.append(places[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
        if places[-1] > len(self._memory):
            self.release()
            # Else what is made during inference could not be written to by others.
            with torch.inference_mode(mode=False):
                self._memory = torch.empty(places[-1], dtype=torch.uint8)
            prefer_huge_pages(self._memory)
        return [
            self._memory[first : first + size].view(dtype).view(shape)
            for first, size, (shape, dtype) in zip(places, sizes, wanted, strict=False)
        ]

    def release(self) -> None:
        """Give this thread's back."""
        self._memory = torch.empty(0, dtype=torch.uint8)


SCRATCH = Scratch()
