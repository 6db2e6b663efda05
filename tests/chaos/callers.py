"""Those who wait while a run dies: a stream, a whole answer, a control operation, and some who come too late."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from .catalogue import LONG_DECODES, LONG_PREFILLS, SHORT
from .service import Answer, GoneError, RefusedError, Service
from .witness import Judge, request_for


@dataclass
class Call:
    """One question and what came of it."""

    name: str
    began: float
    task: asyncio.Task[None]
    ended: float | None = None
    outcome: str = "waits"
    fault: str | None = None


class Callers:
    """Asks, and judges every answer."""

    def __init__(self, service: Service, judge: Judge, choose: random.Random) -> None:
        self._service = service
        self._judge = judge
        self._choose = choose
        self.calls: list[Call] = []

    def stream(self, index: int, first: asyncio.Event | None = None) -> None:
        request = request_for(self._judge.serial, index, self._service, self._choose)
        self._start("stream", lambda: self._service.stream(request, first=first), index, request)

    def whole(self, index: int) -> None:
        request = request_for(self._judge.serial, index, self._service, self._choose)
        self._start("answer", lambda: self._service.generate(request), index, request)

    def control(self, name: str, **arguments: Any) -> None:
        self._start(name, lambda: self._service.control(name, **arguments))

    def pause(self, mode: str) -> None:
        """And go on, and flush."""

        async def operate() -> None:
            await self._service.control("pause_generation", mode=mode)
            await self._service.control("continue_generation")
            await self._service.control("flush_cache")

        self._start(f"a pause, {mode}", operate)

    def info(self) -> None:
        self._start("info", self._service.info)

    def _start(
        self,
        name: str,
        ask: Callable[[], Awaitable[Any]],
        index: int | None = None,
        request: dict[str, Any] | None = None,
    ) -> None:
        async def run() -> None:
            try:
                answer = await ask()
                call.ended, call.outcome = time.monotonic(), "answered"
                if isinstance(answer, Answer) and index is not None and request is not None:
                    whole = answer.finish_reason["type"] == "length"
                    call.fault = self._judge.fault(index, request, answer, whole=whole)
            except (RefusedError, GoneError) as error:
                call.ended, call.outcome = time.monotonic(), f"error: {str(error)[:160]}"

        call = Call(name, time.monotonic(), asyncio.create_task(run()))
        self.calls.append(call)

    def start_mix(self, moment: str) -> asyncio.Event:
        """The callers of a moment. The event is set with the first token of a stream."""
        first = asyncio.Event()
        if moment == "idle":
            first.set()
            return first
        choose = self._choose
        if moment == "prefill":
            first.set()
            for index in LONG_PREFILLS:
                self.whole(index)
        self.stream(choose.choice(LONG_DECODES), first)
        self.whole(choose.choice(LONG_DECODES))
        self.stream(choose.choice(SHORT))
        if moment == "control":
            self.pause(choose.choice(("retract", "in_place")))
        self.info()
        return first

    def start_late_ones(self) -> None:
        self.whole(self._choose.choice(SHORT))
        self.stream(self._choose.choice(SHORT))
        self.info()

    async def wait(self, until: float) -> None:
        """For all of them, to that time at most."""
        tasks = [call.task for call in self.calls]
        if tasks:
            await asyncio.wait(tasks, timeout=max(0.0, until - time.monotonic()))

    def faults(self, struck_at: float, bound_s: float) -> list[str]:
        """Who waits beyond the bound, counted from the fault or, if later, from the question; and wrong answers."""
        found = [call.fault for call in self.calls if call.fault is not None]
        for call in self.calls:
            if (waited := self._waited(call, struck_at)) > bound_s:
                how = call.outcome if call.ended is not None else "still waits"
                found.append(f"{call.name} waited {waited:.1f} s: {how}")
        return found

    def worst_wait(self, struck_at: float) -> float:
        return max((self._waited(call, struck_at) for call in self.calls), default=0.0)

    @staticmethod
    def _waited(call: Call, struck_at: float) -> float:
        return (call.ended or time.monotonic()) - max(call.began, struck_at)

    def told(self) -> str:
        errors = sum(call.outcome.startswith("error") for call in self.calls)
        return f"{len(self.calls) - errors} answers, {errors} errors"

    def give_up(self) -> None:
        for call in self.calls:
            call.task.cancel()
