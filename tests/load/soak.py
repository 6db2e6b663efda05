"""Two dp ranks under random arrivals, aborts, flushes and pauses for ten minutes: no deadlock, no leak, and every answer
that of a serial run.

    make soak [ARGS="--seconds 120 --tp 2 --dispatcher all_to_all"]

First a serial engine (one rank, one request at a time) answers a catalogue of prompts. Then clients ask two dp ranks for
them, all at once and each in its own way: plain, streamed, with rows from a position on, by reference, on a named rank, in
a session; some give up. Greedy, in float32: tokens and rows must be the serial run's. Where they differ, the reference
must find a near-tie. The pool is small, so that requests are retracted. At the end every page is free again, no process
holds more file descriptors than at the start, and none has grown in the second half.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
from http_load import MAX_GROWTH_BYTES, MIB, MemoryWatch, name_of
from support.serial_run import CHECKPOINT, Question, SerialRun, greedy, make_catalogue
from support.server_process import FEW_SHAPES

from waybill import Engine
from waybill.engine.control.operations import PAUSE_MODES

NUM_PROMPTS = 48
# A rank holds two or three of the longest requests: retractions are common.
KV_CACHE_TOKENS = 600
NUM_CLIENTS = 10
# Nothing may take longer, however busy the machine is: longer is a deadlock.
PATIENCE_S = 90.0


@dataclass
class Soak:
    """The engine under test, what it must answer, and what was seen."""

    engine: Engine
    serial: SerialRun
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
            request["routed_dp_rank"] = int(choose.random() < 0.8)
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
        assert len(state["dp_ranks"]) == 2


async def lull(soak: Soak, deadline: float, clients: list[Client], disturber: Disturber) -> None:
    """Rounds of load with silence in between: sleeping and waking are part of it, and so are flushes that succeed."""
    choose = random.Random("rounds")
    while time.monotonic() < deadline and not soak.faults:
        until = min(deadline, time.monotonic() + choose.uniform(2.0, 12.0))
        some = choose.sample(clients, choose.randint(1, len(clients)))
        await asyncio.gather(disturber.run(until), *(client.run(until) for client in some))
        await disturber.flush()
        soak.seen["rounds"] += 1


async def watch_progress(soak: Soak, work: asyncio.Task[None]) -> None:
    """Ends the run when nothing has been answered for too long."""
    last, since = -1, time.monotonic()
    while not work.done():
        await asyncio.wait([work], timeout=1.0)
        if soak.seen["compared"] != last:
            last, since = soak.seen["compared"], time.monotonic()
        elif time.monotonic() - since > PATIENCE_S:
            soak.faults.append(f"nothing was answered for {PATIENCE_S:.0f} s: a deadlock")
            work.cancel()
            return
    work.result()


async def put_load(soak: Soak, watch: MemoryWatch, seconds: float, seed: int) -> None:
    began = time.monotonic()
    clients = [Client(soak, number, seed) for number in range(NUM_CLIENTS)]
    work = asyncio.create_task(lull(soak, began + seconds, clients, Disturber(soak, seed)))
    watching = asyncio.create_task(watch.run(began, seconds))
    await watch_progress(soak, work)
    watching.cancel()


def at_rest(engine: Engine) -> dict[str, Any]:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        state = engine.get_server_info()
        if not state["num_running"] + state["num_waiting"] or time.monotonic() > deadline:
            return state
        time.sleep(0.05)


def open_files(processes: list[psutil.Process]) -> dict[str, int]:
    return {name_of(process): process.num_fds() for process in processes}


def check_leaks(soak: Soak, watch: MemoryWatch, before: dict[str, int], after: dict[str, int]) -> None:
    state = at_rest(soak.engine)
    if state["num_running"] + state["num_waiting"]:
        soak.faults.append(f"{state['num_running']} requests run and {state['num_waiting']} wait at the end")
        return
    soak.engine.flush_cache()
    for rank, each in enumerate(soak.engine.get_server_info()["dp_ranks"]):
        if each["num_free_pages"] != each["num_pages"]:
            soak.faults.append(f"rank {rank}: {each['num_pages'] - each['num_free_pages']} pages are leaked")
        if each["routing_ring_occupied"]:
            soak.faults.append(f"rank {rank}: {each['routing_ring_occupied']} ring slots are not given back")
    if state["routed_experts_refused"]:
        soak.faults.append(f"{state['routed_experts_refused']} answers had rows missing")
    for name, number in after.items():
        if number > before[name]:
            soak.faults.append(f"{name}: {number} file descriptors, {before[name]} at the start")
    for name, first, second in watch.peaks():
        if second - first > MAX_GROWTH_BYTES:
            soak.faults.append(f"{name} grew by {(second - first) / MIB:.1f} MiB in the second half")


def run_soak(options: argparse.Namespace) -> int:
    os.environ.update(FEW_SHAPES)
    serial = SerialRun.of(make_catalogue(random.Random(options.seed), NUM_PROMPTS))
    with Engine(
        str(CHECKPOINT),
        tp_size=options.tp,
        dp_size=2,
        dtype="float32",
        moe_dispatcher=options.dispatcher,
        overlap_depth=options.overlap,
        chunked_prefill_size=64,
        max_running_requests=6,
        kv_cache_tokens=KV_CACHE_TOKENS,
        page_size=2,
        enable_return_routed_experts=True,
        claim_budget_bytes=1 << 20,
    ) as engine:
        soak = Soak(engine, serial)
        processes = [
            each for each in psutil.Process().children(recursive=True) if engine.run_dir in str(each.cmdline())
        ]
        asyncio.run(put_load(soak, MemoryWatch([]), 2.0, options.seed + 1))
        at_rest(engine)
        before = open_files(processes)
        watch = MemoryWatch(processes)
        asyncio.run(put_load(soak, watch, options.seconds, options.seed))
        state = at_rest(engine)
        check_leaks(soak, watch, before, open_files(processes))
    print(f"soak: {dict(soak.seen)}; {state['num_retractions']} retractions, {state['num_steps']} steps")
    for name, first, second in watch.peaks():
        print(f"soak: {name}: {first / MIB:.1f} MiB at most in the first half, {second / MIB:.1f} in the second")
    needed = ("length", "abort", "flushed", "flush refused", "rounds", *(f"paused, {mode}" for mode in PAUSE_MODES))
    missing = [kind for kind in needed if not soak.seen[kind]] + ([] if state["num_retractions"] else ["retractions"])
    if missing:
        soak.faults.append(f"never happened: {', '.join(missing)}")
    for fault in soak.faults[:20]:
        print(f"soak: {fault}", file=sys.stderr)
    return 1 if soak.faults else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Two dp ranks under random arrivals, aborts and flushes.")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--dispatcher", choices=("all_gather", "all_to_all"), default="all_gather")
    parser.add_argument("--overlap", type=int, choices=(0, 1), default=1)
    parser.add_argument("--seed", type=int, default=0)
    return run_soak(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
