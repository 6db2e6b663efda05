"""A file in memory without a name: gone with who holds it, however it ends. Without torch: the frontend needs it, too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def memory_file() -> Iterator[tuple[int, str]]:
    """A descriptor to write to, and a path at which this user's processes on this host can open the file in the block."""
    descriptor = os.memfd_create("waybill-weights", os.MFD_CLOEXEC)
    try:
        yield descriptor, f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """All of it, however much one call takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
