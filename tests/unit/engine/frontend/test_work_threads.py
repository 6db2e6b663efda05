"""Short work never waits behind long work, and neither holds up the event loop."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from functools import partial

from waybill.engine.frontend.work_threads import MAX_INLINE_US, MAX_SHORT_US, THREADS_PER_POOL, WorkThreads

SHORT, LONG = MAX_INLINE_US + 1, MAX_SHORT_US + 1


def here() -> int:
    return threading.get_ident()


def test_short_work_passes_long_work_and_small_work_stays_here() -> None:
    async def run() -> None:
        work_threads, may_end = WorkThreads(), threading.Event()
        long = [
            asyncio.ensure_future(work_threads.run(LONG, lambda: may_end.wait(30))) for _ in range(2 * THREADS_PER_POOL)
        ]
        await asyncio.sleep(0)
        assert await asyncio.wait_for(work_threads.run(SHORT, here), 30) != here()
        assert await work_threads.run(MAX_INLINE_US, here) == here()
        assert not any(task.done() for task in long)
        may_end.set()
        assert all(await asyncio.gather(*long))
        work_threads.close()

    asyncio.run(run())


def test_work_that_nobody_waits_for_is_taken_out() -> None:
    async def run() -> None:
        work_threads, may_end, begun = WorkThreads(), threading.Event(), []
        holding = [
            asyncio.ensure_future(work_threads.run(LONG, lambda: may_end.wait(30))) for _ in range(THREADS_PER_POOL)
        ]
        await asyncio.sleep(0)
        given_up = asyncio.ensure_future(work_threads.run(LONG, lambda: begun.append(1)))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.gather(given_up, return_exceptions=True)
        may_end.set()
        await asyncio.gather(*holding)
        await work_threads.run(LONG, here)
        assert not begun
        work_threads.close()

    asyncio.run(run())


def test_what_nobody_waits_for_holds_no_memory_until_its_turn_comes() -> None:
    class Text:
        """Something that a request brought."""

    async def run() -> None:
        work_threads, may_end = WorkThreads(), threading.Event()
        holding = [
            asyncio.ensure_future(work_threads.run(LONG, lambda: may_end.wait(30))) for _ in range(THREADS_PER_POOL)
        ]
        await asyncio.sleep(0)
        text = Text()
        seen = weakref.ref(text)
        given_up = asyncio.ensure_future(work_threads.run(LONG, partial(id, text)))
        del text
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.gather(given_up, return_exceptions=True)
        del given_up
        gc.collect()
        assert seen() is None
        may_end.set()
        await asyncio.gather(*holding)
        work_threads.close()

    asyncio.run(run())
