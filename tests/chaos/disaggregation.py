"""Faults between an engine for prompts and one for what follows: whichever dies, is stopped or is cut off, callers have an
error or the right answer, in time, nothing is left behind, and what comes next is right.

Two servers on one host, by shared memory or, every second time, TCP. In each trial some callers are in the middle of
prompts and answers when it happens; answers that come are compared with a serial run's, tokens and rows. A side that has
died is started anew, the other one goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time

import psutil
from support.serial_run import SerialRun

from .catalogue import LONG_DECODES, LONG_PREFILLS, SHORT, make_questions
from .kept import Result
from .scene_trials import SERVICE_TRIALS, judge_answer
from .service import GoneError, RefusedError
from .sides import TRANSFER_TIMEOUT_S, Side, Sides
from .witness import Judge, request_for

KINDS = {
    "kill-prefill": 3,
    "kill-decode": 3,
    "stop-prefill": 3,
    "stop-decode": 3,
    "long-stop": 1,
    "cut": 4,
    "leave": 3,
}
# What callers may not notice.
HARMLESS = ("leave",)
ROLES = ("rank 0", "rank 0", "output processor", "frontend", "agent")
NUM_CALLERS = 5
GRACE_S = 15.0
# An engine that is silent for 10 s is taken for dead; a question may wait for as long as a transfer may take.
BOUND_S = max(10.0, TRANSFER_TIMEOUT_S) + GRACE_S
MAX_MORE_FDS = 24
LAST_WORDS = 500


class SidesScene:
    """See `Scene`."""

    def __init__(self, judge: Judge, transport: str) -> None:
        self._judge = judge
        self._transport = transport
        self.sides = Sides(transport)
        self._fds: dict[str, int] = {}

    async def start(self) -> None:
        await self.sides.start()

    async def stop(self) -> list[str]:
        return [fault for side in self.sides.all for fault in await side.stop()]

    def clean_up(self) -> None:
        for side in self.sides.all:
            side.place.clean_up()

    async def run(self, seed: int, kind: str) -> Result:
        result = Result("sides", seed, kind, self._transport, BOUND_S)
        choose, began, near_ties = random.Random(seed), time.monotonic(), self._judge.num_by_near_ties
        callers = [asyncio.create_task(self._call(result, choose)) for _ in range(NUM_CALLERS)]
        await asyncio.sleep(choose.random() * 0.8)
        try:
            await self._strike(result, choose, callers)
        except psutil.NoSuchProcess as error:
            result.what = f"nothing: {error}"
        await asyncio.gather(*callers, return_exceptions=True)
        await self._recover(result, choose)
        result.num_by_near_ties = self._judge.num_by_near_ties - near_ties
        result.seconds = time.monotonic() - began
        return result

    async def _call(self, result: Result, choose: random.Random) -> None:
        index = choose.choice((*SHORT, *LONG_DECODES, *LONG_PREFILLS, *LONG_PREFILLS))
        request = request_for(self._judge.serial, index, self.sides.decode.running, choose)
        request.pop("routed_dp_rank", None)
        asking = self.sides.ask(request, streams=choose.random() < 0.4)
        await judge_answer(result, self._judge, index, request, asking, HARMLESS)

    async def _strike(self, result: Result, choose: random.Random, callers: list[asyncio.Task[None]]) -> None:
        kind, side = result.kind, self.sides.all[result.kind.endswith("decode")]
        if kind == "leave":
            gone = choose.sample(callers, choose.randint(1, NUM_CALLERS))
            for caller in gone:
                caller.cancel()
            result.what = f"{len(gone)} of {NUM_CALLERS} callers leave"
        elif kind == "cut":
            num_cut = self.sides.cut()
            result.what = f"{num_cut} connections shut"
        elif kind.startswith("kill"):
            role = choose.choice(ROLES)
            side.place.process(role).kill()
            result.what = f"SIGKILL to the {side.name}'s {role}"
        else:
            side = choose.choice(self.sides.all) if kind == "long-stop" else side
            role = choose.choice(("rank 0", "rank 0", "output processor"))
            seconds = choose.uniform(11.0, 14.0) if kind == "long-stop" else choose.uniform(0.3, 3.0)
            process = side.place.process(role)
            process.suspend()
            await asyncio.sleep(seconds)
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
            result.what = f"the {side.name}'s {role} stopped for {seconds:.1f} s"

    async def _recover(self, result: Result, choose: random.Random) -> None:
        for side in self.sides.all:
            if await self._is_gone(side, result.kind):
                result.faults += await side.end()
                await side.start()
                self._fds.pop(side.name, None)
        # The next question is answered, rightly, whoever is new.
        index = choose.choice(SHORT)
        request = request_for(self._judge.serial, index, self.sides.decode.running, choose)
        request.pop("routed_dp_rank", None)
        for attempt in range(2):
            try:
                answer = await asyncio.wait_for(self.sides.ask(request), 2 * BOUND_S)
            except (GoneError, RefusedError, TimeoutError) as error:
                # A question to an engine that has gone meanwhile is told so, and asks anew who is there.
                if attempt:
                    result.faults.append(f"afterwards: {error!r}")
                continue
            fault = self._judge.fault(index, request, answer)
            result.faults += [] if fault is None else [f"afterwards: {fault}"]
            break
        for side in self.sides.all:
            with contextlib.suppress(GoneError, RefusedError):
                result.faults += await side.rest()
        result.faults += self._more_than_before()

    @staticmethod
    async def _is_gone(side: Side, kind: str) -> bool:
        """A kill ends a run within moments; after a stop it may have ended, too."""
        if kind in (f"kill-{side.name}", "long-stop"):
            with contextlib.suppress(TimeoutError):
                await side.running.wait_for_exit(30.0 if kind.startswith("kill") else 10.0)
        return await side.has_ended()

    def _more_than_before(self) -> list[str]:
        """Descriptors that a rank holds more than at first, and pools of engines that are no more."""
        faults = []
        for side in self.sides.all:
            try:
                num_fds = side.rank().num_fds()
            except psutil.NoSuchProcess:
                faults.append(f"{side.name}: has ended by itself: {side.running.last_words()[-LAST_WORDS:]}")
                continue
            first = self._fds.setdefault(side.name, num_fds)
            if num_fds > first + MAX_MORE_FDS:
                faults.append(f"{side.name}: {num_fds} descriptors, {first} at first")
        if faults:
            return faults
        foreign = self.sides.decode.mapped_pools() - self.sides.prefill.mapped_pools()
        return faults + [f"decode: maps the pool {inode} of nobody" for inode in foreign]


class SidesScenes:
    """See `Scenes`. `transport` is "shared", "tcp" or "both"."""

    name = "sides"
    kinds = KINDS

    def __init__(self, judge: Judge, transport: str) -> None:
        self._judge = judge
        self._transport = transport

    def transport_of(self, seed: int) -> str:
        if self._transport != "both":
            return self._transport
        return "tcp" if seed // SERVICE_TRIALS % 2 else "shared"

    def make(self, transport: str) -> SidesScene:
        return SidesScene(self._judge, transport)


def serial_run() -> SerialRun:
    """By one thread, which waits for no other on a machine that is busy."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        return SerialRun.of(make_questions(num_decoded=100, num_prefilled=600))
    finally:
        os.sched_setaffinity(0, cores)
