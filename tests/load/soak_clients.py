"""Who puts load on an engine in `soak.py`: clients that ask, each in its own way, and what an operator does meanwhile."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from support.serial_run import Question, SerialRun, greedy

from waybill import Engine
from waybill.engine.control.operations import PAUSE_MODES

NUM_CLIENTS = 10


@dataclass
class Soak:
    """The engine under test, what it must answer, and what was seen."""

    engine: Engine
    serial: SerialRun
    dp_size: int
    seen: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    @property
    def catalogue(self) -> list[Question]:
        return self.serial.catalogue

    def compare(self, index: int, output: list[int], rows: np.ndarray, start: int) -> None:
        """Equal to the serial run's, as far as both go; or by near-ties, which the reference must find."""
        self.seen["compared"] += 1
        if self.serial.is_same(index, output, rows, start):
            return
        self.seen["by near-ties"] += 1
        fault = self.serial.beyond_near_ties(index, output, rows, start)
        if fault is not None:
            self.faults.append(fault)


class Client:
    """Asks one question after the other until the deadline."""

    def __init__(self, soak: Soak, number: int, seed: int) -> None:
        self._soak = soak
        self._number = number
        self._choose = random.Random(f"{seed}-{number}")
        self._num_asked = 0

    async def run(self, deadline: float) -> None:
        while time.monotonic() < deadline and not self._soak.faults:
            index = self._choose.randrange(len(self._soak.catalogue))
            ways = (self.ask_plainly, self.ask_plainly, self.ask_in_a_stream, self.give_up, self.ask_by_reference)
            await self._choose.choice(ways)(index)
            if self._choose.random() < 0.2:
                await asyncio.sleep(self._choose.expovariate(10.0))

    def request(self, index: int) -> tuple[dict[str, Any], int]:
        question, choose = self._soak.catalogue[index], self._choose
        start = choose.choice((0, 0, choose.randint(0, len(question.prompt))))
        self._num_asked += 1
        request: dict[str, Any] = {
            "input_ids": question.prompt,
            "sampling_params": greedy(question),
            "rid": f"client-{self._number}-{self._num_asked}-",
            "return_routed_experts": True,
            "routed_experts_start_len": start,
        }
        where = choose.random()
        if where < 0.4:
            # Ragged on purpose: one rank gets most of them.
            request["routed_dp_rank"] = int(choose.random() < 0.8) % self._soak.dp_size
        elif where < 0.6:
            request["session_id"] = f"session {self._number}"
        return request, start

    async def ask_plainly(self, index: int) -> None:
        request, start = self.request(index)
        answer = await self._soak.engine.async_generate(**request)
        self.check(index, start, answer["output_ids"], answer["meta_info"]["routed_experts"], answer)

    async def ask_by_reference(self, index: int) -> None:
        request, start = self.request(index)
        answer = await self._soak.engine.async_generate(routed_experts_delivery="reference", **request)
        claim = answer["meta_info"].get("routed_experts_claim")
        if claim is None:
            self.check(index, start, answer["output_ids"], None, answer)
            return
        routed = await asyncio.to_thread(self._soak.engine.fetch_routed_experts, claim)
        self.check(index, start, answer["output_ids"], routed.rows, answer)

    async def ask_in_a_stream(self, index: int) -> None:
        request, start = self.request(index)
        chunks = await self._soak.engine.async_generate(stream=True, stream_routed_experts=True, **request)
        rows = []
        async for chunk in chunks:
            rows.append(chunk["meta_info"].get("routed_experts"))
        joined = None if any(part is None for part in rows) else np.concatenate(rows)
        self.check(index, start, chunk["output_ids"], joined, chunk)

    async def give_up(self, index: int) -> None:
        """Abort by rid after some tokens, or before the first; what there is by then must be right."""
        request, start = self.request(index)
        after = self._choose.randint(0, 6)
        chunks = await self._soak.engine.async_generate(stream=True, **request)
        seen: list[dict[str, Any]] = []
        if after == 0:
            self._soak.engine.abort_request(request["rid"])
        async for chunk in chunks:
            seen.append(chunk)
            if len(seen) == after:
                self._soak.engine.abort_request(request["rid"])
        last = seen[-1]
        self.check(index, start, last["output_ids"], last["meta_info"].get("routed_experts"), last)

    def check(self, index: int, start: int, output: list[int], rows: np.ndarray | None, answer: dict[str, Any]) -> None:
        soak, question = self._soak, self._soak.catalogue[index]
        meta = answer["meta_info"]
        reason = meta["finish_reason"]["type"]
        soak.seen[reason] += 1
        if rows is None:
            soak.faults.append(f"question {index}: no rows: {meta.get('routed_experts_error')}")
            return
        expected = max(0, len(question.prompt) + len(output) - 1 - start)
        if reason == "abort":
            expected = min(expected, len(rows))
        elif len(output) != question.num_new:
            soak.faults.append(f"question {index}: {len(output)} tokens of {question.num_new}")
        if len(rows) != expected:
            soak.faults.append(f"question {index}: {len(rows)} rows of {expected}")
            return
        soak.compare(index, output, rows, start)


class Disturber:
    """What an operator does meanwhile, at random times. Another kind of disturbance is another method in `kinds`."""

    def __init__(self, soak: Soak, seed: int) -> None:
        self._soak = soak
        self._choose = random.Random(f"{seed}-disturber")
        self.kinds: list[Callable[[], Awaitable[None]]] = [
            self.flush,
            self.flush,
            self.abort_some,
            self.pause,
            self.look,
        ]

    async def run(self, deadline: float) -> None:
        while time.monotonic() < deadline and not self._soak.faults:
            await asyncio.sleep(self._choose.expovariate(2.0))
            await self._choose.choice(self.kinds)()

    async def flush(self) -> None:
        try:
            await asyncio.to_thread(self._soak.engine.flush_cache)
            self._soak.seen["flushed"] += 1
        except RuntimeError:
            self._soak.seen["flush refused"] += 1

    async def abort_some(self) -> None:
        self._soak.engine.abort_request(f"client-{self._choose.randrange(NUM_CLIENTS)}-")
        self._soak.seen["aborts"] += 1

    async def pause(self) -> None:
        """Requests that run are ended, lose their pages, or stay where they are; others come meanwhile, and wait."""
        mode = self._choose.choice(PAUSE_MODES)
        await asyncio.to_thread(self._soak.engine.pause_generation, mode)
        await asyncio.sleep(self._choose.expovariate(5.0))
        await asyncio.to_thread(self._soak.engine.continue_generation)
        self._soak.seen[f"paused, {mode}"] += 1

    async def look(self) -> None:
        state = await asyncio.to_thread(self._soak.engine.get_server_info)
        assert len(state["dp_ranks"]) == self._soak.dp_size
