"""What a stream's reader gets of how the stream ends."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from waybill.engine.frontend.engine_connection import EngineDeadError
from waybill.launch.engine import Engine, end_tasks

# Ends a stream, and is told when its reader has come to it.
PREPARED = "prepared"


async def items(*given: Any) -> AsyncIterator[Any]:
    for item in given:
        if isinstance(item, BaseException):
            raise item
        yield item


def pump(*given: Any) -> list[Any]:
    """What a reader is given of a stream that yields these items, or raises them."""
    taken: list[Any] = []

    async def prepare(request: Any) -> str:
        return PREPARED

    manager = SimpleNamespace(prepare=prepare, generate=lambda prepared, form: items(*given))

    async def run() -> None:
        await Engine._pump(SimpleNamespace(_manager=manager), None, taken.append)  # type: ignore[arg-type]

    if any(isinstance(item, asyncio.CancelledError) for item in given):
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(run())
    else:
        asyncio.run(run())
    return taken


def chunk(text: str) -> dict[str, Any]:
    return {"text": text, "output_ids": [], "meta_info": {}}


def test_items_are_cumulative_and_the_end_and_an_error_are_told() -> None:
    assert pump(chunk("a"), chunk("b")) == [chunk("a"), chunk("ab"), PREPARED]
    error = ValueError("no")
    assert pump(chunk("a"), error) == [chunk("a"), error]


def test_a_stream_that_is_cancelled_by_a_shutdown_does_not_leave_its_reader_waiting() -> None:
    taken = pump(chunk("a"), asyncio.CancelledError())
    assert taken[0] == chunk("a") and isinstance(taken[1], EngineDeadError)


def test_nobody_waits_for_a_loop_that_ends() -> None:
    """Also whoever waits for work on a thread that goes on."""
    loop, may_end = asyncio.new_event_loop(), threading.Event()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    waiting = asyncio.run_coroutine_threadsafe(asyncio.to_thread(may_end.wait, 30), loop)
    asyncio.run_coroutine_threadsafe(end_tasks(), loop).result(10)
    with pytest.raises(concurrent.futures.CancelledError):
        waiting.result(10)
    may_end.set()
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()
