"""Work that grows with what a client sends, kept off the event loop.

Small work is done at once: a hop to a thread would cost more. The rest goes to one of two pools of few threads each, so
that a text of 10,000 characters never waits behind one of 20 MB, and long ones hold no more than one pool's threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

# What may hold up the event loop, and what may hold up short work of others.
MAX_INLINE_US = 2_000
MAX_SHORT_US = 100_000
THREADS_PER_POOL = 2


class WorkThreads:
    """Lives on one event loop. A caller that is cancelled takes work that has not begun out of its pool."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(THREADS_PER_POOL, "short work")
        self._long = ThreadPoolExecutor(THREADS_PER_POOL, "long work")

    async def run(self, cost_us: float, work: Callable[[], T]) -> T:
        """The result of `work`, which is expected to take about `cost_us` microseconds; raises what it raises."""
        if cost_us <= MAX_INLINE_US:
            return work()
        pool = self._short if cost_us <= MAX_SHORT_US else self._long
        # An executor keeps what was cancelled until its turn comes, and that keeps this frame; what the work holds must not
        # stay for so long.
        held = [work]
        del work
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, lambda: held.pop()())
        except asyncio.CancelledError:
            held.clear()
            raise

    def close(self) -> None:
        """Drop what has not begun."""
        for pool in (self._short, self._long):
            pool.shutdown(wait=False, cancel_futures=True)
