"""Faults between an engine for prompts and one for what follows: whichever dies, is stopped or is cut off, callers have an
error or the right answer, in time, nothing is left behind, and what comes next is right.

    make chaos-disaggregation [ARGS="--trials 20" | "--seed 7" | "--only kill-prefill" | "--write"]

Two servers on one host, by shared memory or (every fourth service) TCP. In each trial some callers are in the middle of
prompts and answers when it happens; answers that come are compared with a serial run's, tokens and rows. A side that has
died is started anew, the other one goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field

import psutil
from support.serial_run import SerialRun

from .catalogue import LONG_DECODES, LONG_PREFILLS, SHORT, make_questions
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
# Until both sides are stopped, as an operator does it, and others started.
SERVICE_TRIALS = 10
LAST_WORDS = 500


@dataclass
class Result:
    seed: int
    kind: str
    what: str = ""
    num_right: int = 0
    num_errors: int = 0
    num_left: int = 0
    wait_s: float = 0.0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)

    def line(self) -> str:
        return (
            f"{'FAIL' if self.faults else 'ok':4} seed {self.seed:<4} {self.kind}: {self.what}; {self.num_right} right, "
            f"{self.num_errors} errors, {self.num_left} left; waited {self.wait_s:.1f} of {BOUND_S:.0f} s; "
            f"{self.seconds:.1f} s"
        )


def kind_of(seed: int) -> str:
    """So many of each in a row of trials."""
    deck = [kind for kind, count in KINDS.items() for _ in range(count)]
    random.Random(seed // len(deck)).shuffle(deck)
    return deck[seed % len(deck)]


class Campaign:
    def __init__(self, judge: Judge, transport: str) -> None:
        self._judge = judge
        self.sides = Sides(transport)
        self.results: list[Result] = []
        self._fds: dict[str, int] = {}

    async def run(self, seed: int, kind: str) -> Result:
        result, choose, began = Result(seed, kind), random.Random(seed), time.monotonic()
        self.results.append(result)
        callers = [asyncio.create_task(self._call(result, choose)) for _ in range(NUM_CALLERS)]
        await asyncio.sleep(choose.random() * 0.8)
        try:
            await self._strike(result, choose, callers)
        except psutil.NoSuchProcess as error:
            result.what = f"nothing: {error}"
        await asyncio.gather(*callers, return_exceptions=True)
        await self._recover(result, choose)
        result.seconds = time.monotonic() - began
        return result

    async def _call(self, result: Result, choose: random.Random) -> None:
        index = choose.choice((*SHORT, *LONG_DECODES, *LONG_PREFILLS, *LONG_PREFILLS))
        request = request_for(self._judge.serial, index, self.sides.decode.running, choose)
        request.pop("routed_dp_rank", None)
        streams, began = choose.random() < 0.4, time.monotonic()
        try:
            answer = await asyncio.wait_for(self.sides.ask(request, streams=streams), 4 * BOUND_S)
        except (GoneError, RefusedError) as error:
            result.num_errors += 1
            if result.kind in HARMLESS:
                result.faults.append(f"an error: {error}")
        except TimeoutError:
            result.faults.append("no answer at all")
        except asyncio.CancelledError:
            result.num_left += 1
            raise
        else:
            fault = self._judge.fault(index, request, answer)
            result.num_right += fault is None
            if fault is not None:
                result.faults.append(fault)
        waited = time.monotonic() - began
        result.wait_s = max(result.wait_s, waited)
        if waited > BOUND_S:
            result.faults.append(f"waited {waited:.1f} s")

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


def trials_of(options: argparse.Namespace) -> list[tuple[int, str]]:
    if options.seed is not None:
        return [(options.seed, options.only or kind_of(options.seed))]
    trials = [(seed, kind_of(seed)) for seed in range(options.first, options.first + options.trials)]
    return [(seed, kind) for seed, kind in trials if options.only in (None, kind)]


async def campaign(options: argparse.Namespace, judge: Judge) -> tuple[list[Result], Counter[str]]:
    results: list[Result] = []
    transports: Counter[str] = Counter()
    trials, until = trials_of(options), time.monotonic() + 60 * options.minutes
    for number, first in enumerate(range(0, len(trials), SERVICE_TRIALS)):
        transport = {"both": "tcp" if number % 4 == 1 else "shared"}.get(options.transport, options.transport)
        if time.monotonic() > until:
            break
        one = Campaign(judge, transport)
        try:
            await one.sides.start()
            for seed, kind in trials[first : first + SERVICE_TRIALS]:
                if time.monotonic() > until:
                    break
                result = await one.run(seed, kind)
                transports[transport] += 1
                print(result.line(), *(f"     {fault}" for fault in result.faults), sep="\n", flush=True)
        finally:
            results += one.results
            try:
                left = [fault for side in one.sides.all for fault in await side.stop()]
            finally:
                # Also where it was interrupted.
                for side in one.sides.all:
                    side.place.clean_up()
            if left and results:
                results[-1].faults += left
    return results, transports


def serial_run() -> SerialRun:
    """By one thread, which waits for no other on a machine that is busy."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        return SerialRun.of(make_questions(num_decoded=100, num_prefilled=600))
    finally:
        os.sched_setaffinity(0, cores)
