"""The shared memory that encoded images are in: one memfd, which has no name and is gone with the last process that has it
open."""

from __future__ import annotations

import mmap
import os


class ImageArena:
    """Every image has a place of its own, which no other one ever gets: who reads one that is gone reads zeros, never
    another image. What is freed takes no memory any more, whoever has the arena open."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("waybill-images", os.MFD_CLOEXEC)
        self._end = 0

    @property
    def path(self) -> str:
        """By which processes of this user open it."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    @staticmethod
    def size_of(num_bytes: int) -> int:
        """The memory that so many bytes take: whole pages."""
        return -(-num_bytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY

    def allocate(self, num_bytes: int) -> int:
        """The offset of a new place. It takes memory when it is written to."""
        offset = self._end
        self._end += self.size_of(num_bytes)
        os.ftruncate(self._fd, self._end)
        return offset

    def write(self, offset: int, data: memoryview) -> None:
        """From any thread.

        Raises:
            OSError: there is no memory for it.
        """
        written = 0
        while written < data.nbytes:
            written += os.pwrite(self._fd, data[written:], offset + written)

    def free(self, offset: int, num_bytes: int) -> None:
        with mmap.mmap(self._fd, num_bytes, offset=offset) as place:
            place.madvise(mmap.MADV_REMOVE)

    def close(self) -> None:
        os.close(self._fd)
