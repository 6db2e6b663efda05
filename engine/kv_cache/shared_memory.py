"""Host memory that other processes can map: a memfd. It has no name, and is gone with the last process that maps it."""

from __future__ import annotations

import mmap
import os

import torch


class SharedMemory:
    """`num_bytes` of zeros, which take room as they are written."""

    def __init__(self, num_bytes: int, name: str) -> None:
        self._fd = os.memfd_create(name, os.MFD_CLOEXEC)
        os.ftruncate(self._fd, num_bytes)
        self._map = mmap.mmap(self._fd, num_bytes)
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)

    @property
    def path(self) -> str:
        """How another process of this user on this host opens it, while this one lives."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def discard(self) -> None:
        """Give the memory back to the host: whoever maps it reads zeros from now on, and writing takes room again."""
        self._map.madvise(mmap.MADV_REMOVE)
