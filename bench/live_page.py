"""What an open page costs requests: latencies with nobody looking and with four viewers of `/events`, side by side.

    python bench/live_page.py [--write] [--pairs 12]

One server of the embedded model on dp 2 x tp 1 with routes on. Blocks of 40 requests at concurrency 4, each of 24 tokens
with its routes, in pairs: one block without viewers and one with; which comes first changes from pair to pair. A ratio is
that of a pair, with over without; its median over the pairs is given with its quartiles.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import httpx
import numpy as np
from delivery import serve
from machine import describe, write_result

CONCURRENCY, NUM_REQUESTS, NUM_TOKENS, NUM_VIEWERS = 4, 40, 24, 4
MILLI = 1e3


async def one_request(client: httpx.AsyncClient, number: int) -> float:
    """Seconds."""
    ids = [1 + (number * 31 + at * 7) % 200 for at in range(32)]
    params = {"max_new_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0.0}
    body = {"input_ids": ids, "sampling_params": params, "return_routed_experts": True}
    began = time.perf_counter()
    reply = await client.post("/generate", json=body)
    reply.raise_for_status()
    return time.perf_counter() - began


async def block(client: httpx.AsyncClient) -> tuple[float, float]:
    """p50 and p99 of a block, in milliseconds."""
    numbers = iter(range(NUM_REQUESTS))
    seconds: list[float] = []

    async def worker() -> None:
        for number in numbers:
            seconds.append(await one_request(client, number))

    await asyncio.gather(*(worker() for _ in range(CONCURRENCY)))
    p50, p99 = np.percentile(seconds, (50, 99))
    return MILLI * float(p50), MILLI * float(p99)


@asynccontextmanager
async def viewers(client: httpx.AsyncClient) -> AsyncIterator[None]:
    """Pages that read their events, all of which have had one."""
    seen = [asyncio.Event() for _ in range(NUM_VIEWERS)]

    async def view(first: asyncio.Event) -> None:
        async with client.stream("GET", "/events") as reply:
            reply.raise_for_status()
            async for _ in reply.aiter_lines():
                first.set()

    tasks = [asyncio.create_task(view(one)) for one in seen]
    await asyncio.gather(*(one.wait() for one in seen))
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def measure(url: str, num_pairs: int) -> dict[str, list[tuple[float, float]]]:
    results: dict[str, list[tuple[float, float]]] = {"closed": [], "open": []}
    async with httpx.AsyncClient(base_url=url, timeout=120.0) as client:
        await block(client)
        for pair in range(num_pairs):
            for kind in ("closed", "open") if pair % 2 else ("open", "closed"):
                if kind == "closed":
                    results[kind].append(await block(client))
                else:
                    async with viewers(client):
                        results[kind].append(await block(client))
    return results


def report(results: dict[str, list[tuple[float, float]]]) -> str:
    lines = ["| | closed, ms | open, ms | ratio (median of pairs) | quartiles |", "| --- | --- | --- | --- | --- |"]
    for index, name in enumerate(("p50", "p99")):
        closed, opened = ([one[index] for one in results[kind]] for kind in ("closed", "open"))
        ratios = [with_it / without for with_it, without in zip(opened, closed, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        lines.append(
            f"| {name} | {statistics.median(closed):.1f} | {statistics.median(opened):.1f} | "
            f"{statistics.median(ratios):.3f} | {low:.3f} .. {high:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--write", action="store_true", help="keep the report in bench/results/live_page.md")
    options = parser.parse_args()
    with serve("--dp", "2", "--tp", "1", "--kv-cache-tokens", "16384", "--log-level", "warning") as url:
        results = asyncio.run(measure(url, options.pairs))
    text = (
        "# Requests with the live page closed and open\n\n"
        f"`python bench/live_page.py --write --pairs {options.pairs}`: {NUM_VIEWERS} viewers, blocks of {NUM_REQUESTS} "
        f"requests at concurrency {CONCURRENCY}, {NUM_TOKENS} tokens each with their routes; embedded model, dp 2 x tp 1. "
        f"{describe()}\n\n{report(results)}\n"
    )
    print(text)
    if options.write:
        write_result("live_page.md", text)


if __name__ == "__main__":
    main()
