"""Two ranks under random arrivals, aborts, flushes and pauses for ten minutes: no deadlock, no leak, and every answer
that of a serial run.

    make soak [ARGS="--seconds 120 --tp 2 --dispatcher all_to_all"]
    make soak ARGS="--seconds 60 --device cuda [--dp 1 --tp 2]"     on two GPUs

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
from typing import Any

import psutil
from http_load import MAX_GROWTH_BYTES, MIB, MemoryWatch, name_of
from soak_clients import NUM_CLIENTS, Client, Disturber, Soak
from support.gpu_memory import free_bytes, most_taken
from support.serial_run import CHECKPOINT, SerialRun, make_catalogue
from support.server_process import FEW_SHAPES
from time_limit import end_after

from waybill import Engine
from waybill.engine.control.operations import PAUSE_MODES

NUM_PROMPTS = 48
# A rank holds two or three of the longest requests: retractions are common.
KV_CACHE_TOKENS = 600
# Nothing may take longer, however busy the machine is: longer is a deadlock.
PATIENCE_S = 90.0
# On a GPU kernels are compiled, and modules loaded, on their first use.
WARM_UP_S = {"cpu": 2.0, "cuda": 15.0}
# What the allocator may still take for a batch that had not come before.
MAX_GPU_GROWTH_BYTES = 1 << 30
# For the serial run, the start, the warm-up and the end.
GRACE_S = 400.0


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


def start_engine(options: argparse.Namespace) -> Engine:
    return Engine(
        str(CHECKPOINT),
        tp_size=options.tp,
        dp_size=options.dp,
        device=options.device,
        dtype="float32",
        moe_dispatcher=options.dispatcher,
        overlap_depth=options.overlap,
        chunked_prefill_size=64,
        max_running_requests=6,
        kv_cache_tokens=KV_CACHE_TOKENS,
        page_size=2,
        enable_return_routed_experts=True,
        claim_budget_bytes=1 << 20,
    )


def put_load_and_check(soak: Soak, options: argparse.Namespace) -> tuple[MemoryWatch, dict[str, Any]]:
    """What was watched, and the engine's state at the end."""
    engine = soak.engine
    processes = [each for each in psutil.Process().children(recursive=True) if engine.run_dir in str(each.cmdline())]
    asyncio.run(put_load(soak, MemoryWatch([]), WARM_UP_S[options.device], options.seed + 1))
    at_rest(engine)
    before = open_files(processes)
    free_before = free_bytes() if options.device == "cuda" else []
    watch = MemoryWatch(processes)
    print("soak: warm", dict(soak.seen), flush=True)
    asyncio.run(put_load(soak, watch, options.seconds, options.seed))
    state = at_rest(engine)
    check_leaks(soak, watch, before, open_files(processes))
    if free_before:
        taken = most_taken(free_before, free_bytes())
        print(f"soak: {taken / MIB:.1f} MiB of a GPU's memory were taken meanwhile")
        if taken > MAX_GPU_GROWTH_BYTES:
            soak.faults.append(f"GPU memory: {taken / MIB:.1f} MiB more than at the start")
    return watch, state


def run_soak(options: argparse.Namespace) -> int:
    os.environ.update(FEW_SHAPES)
    # Everything before and after has bounds of its own, but for a hang of this process.
    end_after(options.seconds + GRACE_S)
    serial = SerialRun.of(make_catalogue(random.Random(options.seed), NUM_PROMPTS), options.device)
    with start_engine(options) as engine:
        soak = Soak(engine, serial, options.dp)
        watch, state = put_load_and_check(soak, options)
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
    parser = argparse.ArgumentParser(description="Ranks under random arrivals, aborts and flushes.")
    parser.add_argument("--seconds", type=float, default=600.0, help="after the warm-up")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dp", type=int, choices=(1, 2), default=2)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--dispatcher", choices=("all_gather", "all_to_all"), default="all_gather")
    parser.add_argument("--overlap", type=int, choices=(0, 1), default=1)
    parser.add_argument("--seed", type=int, default=0)
    return run_soak(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
