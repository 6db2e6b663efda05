"""What other processes hold of the GPUs, as a process that has just started sees it."""

from __future__ import annotations

import subprocess
import sys
import time

FREE = "import torch; print(*(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())))"
# What the driver may keep for itself.
TOLERANCE_BYTES = 64 << 20


def free_bytes() -> list[int]:
    """By device."""
    done = subprocess.run([sys.executable, "-c", FREE], capture_output=True, text=True, timeout=60, check=True)
    return [int(word) for word in done.stdout.split()]


def most_taken(before: list[int], now: list[int]) -> int:
    """Bytes fewer that are free on some device."""
    return max((was - free for was, free in zip(before, now, strict=True)), default=0)


def wait_until_free(before: list[int], deadline_s: float) -> None:
    """Until as much is free as was before."""
    deadline = time.monotonic() + deadline_s
    while most_taken(before, now := free_bytes()) > TOLERANCE_BYTES:
        assert time.monotonic() < deadline, f"GPU memory is left: {before} bytes were free, now {now}"
