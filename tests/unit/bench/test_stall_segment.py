"""The stream of the stall benchmark ends before its time: who waits for its tokens is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from stall_segment import OFF, WARM_UP_TOKENS, steady_stream


class ShortEngine:
    """Streams two tokens more than the warm-up waits for."""

    async def async_generate(self, **request: Any) -> AsyncIterator[dict[str, Any]]:
        async def tokens() -> AsyncIterator[dict[str, Any]]:
            for _ in range(WARM_UP_TOKENS + 2):
                await asyncio.sleep(0.01)
                yield {}

        return tokens()


async def wait_for_too_many() -> None:
    async with steady_stream(ShortEngine(), [1], OFF) as stream:
        await stream.wait_for(50)


def test_a_stream_that_ends_ends_the_wait() -> None:
    with pytest.raises(RuntimeError, match="the stream ended after 6 tokens"):
        asyncio.run(asyncio.wait_for(wait_for_too_many(), 10))
