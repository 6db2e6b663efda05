"""Where files live in memory. Without torch: the frontend needs it, too."""

from __future__ import annotations

from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


def shared_folder() -> Path | None:
    """None, the temporary folder, where the host has no such place."""
    return SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
