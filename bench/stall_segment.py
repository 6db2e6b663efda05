"""One variant's turn in a round: a conversation with a long history on rank 0, while a stream decodes on rank 1.

The next turn is sent `PAUSE_TOKENS` of the stream after an answer has arrived, so that the steps that are scored - those
right after a finish - hold the same work in every variant: the stream, and nothing on rank 0.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from inline_finish import INLINE, INLINE_COMPACT, RID_SEPARATOR
from step_log import StepEntry
from tapped_engine import TappedEngine

from waybill import Engine

OFF, OFF_AGAIN, FULL, DELTA = "off", "off2", "full", "delta"
VARIANTS = (OFF, OFF_AGAIN, INLINE, INLINE_COMPACT, FULL, DELTA)
WITHOUT_ROUTING = (OFF, OFF_AGAIN)
SHIPS_ROUTES = (FULL, DELTA)
BUSY_RANK, STEADY_RANK = 0, 1
STREAM_PROMPT, STREAM_TOKENS = 64, 900
TURN_PROMPT, TURN_OUTPUT = 8, 2
PAUSE_TOKENS = 5
WARM_UP_TOKENS = 4
FIRST_TOKEN = 1


@dataclass
class Segment:
    """What one variant did in one round."""

    variant: str
    steps: list[list[StepEntry]]
    # When the benchmark, as the stream's reader, got each of its tokens.
    arrivals: list[float]
    num_finishes: int
    # CPU time beside the ranks: the output processor's, and that of this process, the caller and frontend.
    processor_cpu_s: float
    caller_cpu_s: float


class SteadyStream:
    """Reads a stream on rank 1 and counts its tokens."""

    def __init__(self) -> None:
        self.arrivals: list[float] = []
        self._has_ended = False
        self._condition = asyncio.Condition()

    async def read(self, engine: Engine, prompt: list[int], variant: str) -> None:
        stream = await engine.async_generate(
            input_ids=prompt,
            sampling_params={"temperature": 0.0, "max_new_tokens": STREAM_TOKENS, "ignore_eos": True},
            stream=True,
            routed_dp_rank=STEADY_RANK,
            return_routed_experts=variant in SHIPS_ROUTES,
        )
        try:
            async for _ in stream:
                self.arrivals.append(time.monotonic())
                async with self._condition:
                    self._condition.notify_all()
        finally:
            self._has_ended = True
            async with self._condition:
                self._condition.notify_all()

    async def wait_for(self, num_more: int) -> None:
        """
        Raises:
            RuntimeError: the stream has ended before.
        """
        wanted = len(self.arrivals) + num_more
        async with self._condition:
            await self._condition.wait_for(lambda: self._has_ended or len(self.arrivals) >= wanted)
        if len(self.arrivals) < wanted:
            raise RuntimeError(f"the stream ended after {len(self.arrivals)} tokens")


@asynccontextmanager
async def steady_stream(engine: Engine, prompt: list[int], variant: str) -> AsyncIterator[SteadyStream]:
    stream = SteadyStream()
    reading = asyncio.create_task(stream.read(engine, prompt, variant))
    waiting = asyncio.create_task(stream.wait_for(WARM_UP_TOKENS))
    await asyncio.wait([reading, waiting], return_when=asyncio.FIRST_COMPLETED)
    if reading.done():
        waiting.cancel()
        reading.result()
        raise RuntimeError("the stream ended before the conversation began")
    try:
        yield stream
    finally:
        # Leaving the stream aborts it.
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


@dataclass
class Conversation:
    """Turns on one rank, each a few new tokens after all that was said before."""

    variant: str
    name: str
    ids: list[int]
    rng: np.random.Generator
    dp_rank: int = BUSY_RANK
    num_turns: int = 0
    # When the caller had each turn's answer, by its rid.
    answered_s: dict[str, float] = field(default_factory=dict)

    async def turn(self, engine: Engine, vocab_size: int) -> None:
        """Ask, and check that as many rows came as the variant promises."""
        held = max(len(self.ids) - 1, 0)
        self.ids = self.ids + self.rng.integers(FIRST_TOKEN, vocab_size, TURN_PROMPT).tolist()
        start = held if self.variant == DELTA else 0
        rid = RID_SEPARATOR.join([self.variant, self.name, str(self.num_turns)])
        answer: Any = await engine.async_generate(
            input_ids=self.ids,
            sampling_params={"temperature": 0.0, "max_new_tokens": TURN_OUTPUT, "ignore_eos": True},
            rid=rid,
            routed_dp_rank=self.dp_rank,
            return_routed_experts=self.variant in SHIPS_ROUTES,
            routed_experts_start_len=start,
        )
        self.answered_s[rid] = time.monotonic()
        self.num_turns += 1
        self.ids = self.ids + answer["output_ids"]
        meta = answer["meta_info"]
        assert meta["cached_tokens"] >= held - 1, f"{meta['cached_tokens']} of {held} tokens were cached"
        if self.variant in SHIPS_ROUTES:
            assert len(meta["routed_experts"]) == len(self.ids) - 1 - start, meta.get("routed_experts_error")


async def run_segment(
    tapped: TappedEngine, variant: str, name: str, history: list[int], num_turns: int, rng: np.random.Generator
) -> Segment:
    """`num_turns` finishes of one variant."""
    engine = tapped.engine
    vocab_size = int(tapped.state["vocab_size"])
    prompt = rng.integers(FIRST_TOKEN, vocab_size, STREAM_PROMPT).tolist()
    conversation = Conversation(variant, name, history, rng)
    processor, caller = tapped.processor_cpu_s(), time.process_time()
    async with steady_stream(engine, prompt, variant) as stream:
        for _ in range(num_turns):
            await conversation.turn(engine, vocab_size)
            await stream.wait_for(PAUSE_TOKENS)
    await asyncio.to_thread(wait_until_idle, tapped)
    return Segment(
        variant,
        await asyncio.to_thread(tapped.take_steps),
        stream.arrivals,
        conversation.num_turns,
        tapped.processor_cpu_s() - processor,
        time.process_time() - caller,
    )


def wait_until_idle(tapped: TappedEngine) -> None:
    while tapped.engine.get_server_info()["num_running"]:
        time.sleep(0.01)
