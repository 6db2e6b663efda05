"""A real server under many streaming clients, a fifth of which leave in the middle: nothing may be lost or grow.

    make load-http [ARGS="--seconds 60 --write"]

Clients talk to the embedded model on two tensor-parallel ranks, over connections that are kept alive; those that leave
close theirs after a random number of tokens. The run fails unless every other stream ends well, no request is left at the
end, all pages are free again after a flush, and the memory of each process of the server has reached a plateau.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import httpx
import psutil
from machine import describe, write_result
from rich import box
from rich.console import Console
from rich.table import Table
from support.server_process import FEW_SHAPES, ServerProcess

from waybill.launch.supervisor import PROCESS

TP_SIZE = 2
# Small, so that caching and eviction reach their steady state in the first half.
KV_CACHE_TOKENS = 16384
VOCAB_SIZE = 256
PROMPT_TOKENS = (8, 96)
NEW_TOKENS = (8, 48)
SHARED_PREFIXES = 16
PREFIX_TOKENS = 32
LEAVING = 5  # every fifth client
STREAM_TIMEOUT_S = 120.0
IDLE_TIMEOUT_S = 30.0
SAMPLE_EVERY_S = 0.5
# The peak of a process in the second half may exceed that of the first by so much.
MAX_GROWTH_BYTES = 16 << 20
MIB = 1 << 20


@dataclass
class Tally:
    """What all clients saw."""

    done: int = 0
    left: int = 0
    tokens: int = 0
    with_routes: int = 0
    first_token_s: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


class StreamingClient:
    """Streams one random request after the other until the deadline."""

    def __init__(self, number: int, url: str, seed: int, tally: Tally, prefixes: list[list[int]]) -> None:
        self._random = random.Random(f"{seed}-{number}")
        self._url = url
        self._leaves = number % LEAVING == 0
        self._tally = tally
        self._prefixes = prefixes

    async def run(self, deadline: float) -> None:
        async with httpx.AsyncClient(base_url=self._url, timeout=STREAM_TIMEOUT_S) as http:
            while time.monotonic() < deadline:
                try:
                    await self._ask(http)
                except (httpx.HTTPError, ValueError, KeyError) as error:
                    self._tally.faults.append(repr(error))
                    return

    def _request(self) -> dict[str, Any]:
        choose = self._random
        prompt = choose.choices(range(VOCAB_SIZE), k=choose.randint(*PROMPT_TOKENS))
        if choose.random() < 0.5:
            prompt = choose.choice(self._prefixes) + prompt
        return {
            "input_ids": prompt,
            "stream": True,
            "return_routed_experts": choose.random() < 0.5,
            "sampling_params": {
                "max_new_tokens": choose.randint(*NEW_TOKENS),
                "temperature": choose.choice((0.0, 1.0)),
                "ignore_eos": True,
            },
        }

    async def _ask(self, http: httpx.AsyncClient) -> None:
        request = self._request()
        num_new = request["sampling_params"]["max_new_tokens"]
        leave_after = self._random.randint(1, num_new - 1) if self._leaves else None
        began = time.monotonic()
        num_events, event, last = 0, "", ""
        async with http.stream("POST", "/generate", json=request) as reply:
            reply.raise_for_status()
            async for line in reply.aiter_lines():
                if not line:
                    continue
                event, last = line, event
                num_events += 1
                if num_events == 1:
                    self._tally.first_token_s.append(time.monotonic() - began)
                if num_events == leave_after:
                    # Leaving the block closes the connection.
                    self._tally.left += 1
                    self._tally.tokens += num_events
                    return
        if event != "data: [DONE]":
            raise ValueError(f"a stream ended with {event[-100:]!r}")
        self._check(request, json.loads(last.removeprefix("data: ")))

    def _check(self, request: dict[str, Any], answer: dict[str, Any]) -> None:
        meta = answer["meta_info"]
        num_new = request["sampling_params"]["max_new_tokens"]
        if meta["finish_reason"] != {"type": "length", "length": num_new}:
            raise ValueError(f"finished with {meta['finish_reason']}")
        if request["return_routed_experts"]:
            rows = meta["routed_experts_meta"]["rows"]
            if rows != len(request["input_ids"]) + num_new - 1:
                raise ValueError(f"{rows} rows for {len(request['input_ids'])} + {num_new} tokens")
            self._tally.with_routes += 1
        self._tally.done += 1
        self._tally.tokens += num_new


class MemoryWatch:
    """Resident bytes of every process of the server, by half of the run."""

    def __init__(self, processes: list[psutil.Process]) -> None:
        self._processes = {process: name_of(process) for process in processes}
        self._peaks: dict[psutil.Process, list[int]] = defaultdict(lambda: [0, 0])

    async def run(self, began: float, seconds: float) -> None:
        while (elapsed := time.monotonic() - began) < seconds:
            half = int(elapsed >= seconds / 2)
            for process in self._processes:
                peaks = self._peaks[process]
                peaks[half] = max(peaks[half], process.memory_info().rss)
            await asyncio.sleep(SAMPLE_EVERY_S)

    def peaks(self) -> list[tuple[str, int, int]]:
        """Name, peak of the first half and of the second."""
        return [(name, *self._peaks[process]) for process, name in self._processes.items()]


def name_of(process: psutil.Process) -> str:
    words = process.cmdline()
    modules = [words[i + 1] for i, word in enumerate(words[:-1]) if word in ("-m", PROCESS)]
    if not modules:
        return process.name()
    name = modules[-1].removeprefix("waybill.")
    return f"{name}, rank {process.environ()['RANK']}" if name == "launch.worker" else name


@dataclass
class LoadResult:
    tally: Tally
    memory: list[tuple[str, int, int]]
    seconds: float
    start: dict[str, Any]
    end: dict[str, Any]
    free_after_flush: int

    def problems(self) -> list[str]:
        """What must not be; [] for a good run."""
        found = list(self.tally.faults)
        if (self.end["num_running"], self.end["num_waiting"]) != (0, 0):
            found.append(f"{self.end['num_running']} requests run and {self.end['num_waiting']} wait at the end")
        if self.free_after_flush != self.start["num_free_pages"]:
            found.append(f"{self.free_after_flush} pages are free, {self.start['num_free_pages']} were at the start")
        for name, first, second in self.memory:
            if second - first > MAX_GROWTH_BYTES:
                found.append(f"{name} grew by {(second - first) / MIB:.1f} MiB in the second half")
        if not self.tally.done or not self.tally.left:
            found.append("nobody finished, or nobody left")
        return found


def free_pages_after_flush(http: httpx.Client) -> int:
    http.post("/flush_cache").raise_for_status()
    return int(http.get("/get_server_info").json()["num_free_pages"])


def info_when_idle(http: httpx.Client) -> dict[str, Any]:
    deadline = time.monotonic() + IDLE_TIMEOUT_S
    while True:
        info: dict[str, Any] = http.get("/get_server_info").json()
        if not info["num_running"] + info["num_waiting"] or time.monotonic() > deadline:
            return info
        time.sleep(0.1)


async def put_load(url: str, watch: MemoryWatch, num_clients: int, seconds: float, seed: int) -> tuple[Tally, float]:
    tally = Tally()
    choose = random.Random(seed)
    prefixes = [choose.choices(range(VOCAB_SIZE), k=PREFIX_TOKENS) for _ in range(SHARED_PREFIXES)]
    began = time.monotonic()
    clients = [StreamingClient(i, url, seed, tally, prefixes) for i in range(num_clients)]
    await asyncio.gather(watch.run(began, seconds), *(client.run(began + seconds) for client in clients))
    return tally, time.monotonic() - began


def run_load(num_clients: int, seconds: float, seed: int) -> LoadResult:
    server = ServerProcess(
        *("--tp", str(TP_SIZE), "--enable-return-routed-experts", "--kv-cache-tokens", str(KV_CACHE_TOKENS)),
        environment={**os.environ, **FEW_SHAPES},
    )
    try:
        with httpx.Client(base_url=server.url, timeout=STREAM_TIMEOUT_S) as http:
            free_pages_after_flush(http)
            start = http.get("/get_server_info").json()
            watch = MemoryWatch([psutil.Process(server.process.pid), *server.descendants()])
            tally, took_s = asyncio.run(put_load(server.url, watch, num_clients, seconds, seed))
            end = info_when_idle(http)
            return LoadResult(tally, watch.peaks(), took_s, start, end, free_pages_after_flush(http))
    finally:
        server.stop()


def as_text(table: Table) -> str:
    console = Console(width=120, file=StringIO(), record=True)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.export_text().strip().splitlines())


def report_of(result: LoadResult, num_clients: int) -> str:
    tally = result.tally
    first = sorted(tally.first_token_s)
    memory = Table(box=box.MARKDOWN)
    for heading in ("process", "peak of the first half, MiB", "of the second, MiB", "growth, MiB"):
        memory.add_column(heading, justify="left" if heading == "process" else "right")
    for name, before, after in result.memory:
        memory.add_row(name, *(f"{value / MIB:.1f}" for value in (before, after, after - before)))
    retractions = result.end["num_retractions"] - result.start["num_retractions"]
    return f"""# HTTP service under load

{describe()}; clients and server share them. Embedded model, tp {TP_SIZE}, {KV_CACHE_TOKENS} KV slots.

{num_clients} streaming clients at once for {result.seconds:.0f} s, every fifth of them leaving each of its streams at a
random token; half of the requests with routes, half of the prompts with a shared prefix.

| measure | value |
| :-- | --: |
| streams done | {tally.done} |
| of them with all their routes | {tally.with_routes} |
| streams that their client left | {tally.left} |
| streams that failed | {len(tally.faults)} |
| tokens received per second | {tally.tokens / result.seconds:.0f} |
| time to first token, median | {first[len(first) // 2]:.2f} s |
| time to first token, 99 % | {first[len(first) * 99 // 100]:.2f} s |
| retractions | {retractions} |
| requests that run or wait at the end | {result.end["num_running"] + result.end["num_waiting"]} |
| free pages at start, and after the last flush | {result.start["num_free_pages"]}, {result.free_after_flush} |

Resident memory of every process of the server; a growth of more than {MAX_GROWTH_BYTES // MIB} MiB fails the run.
Torch's caches of compiled products are bounded for it ({" ".join(f"{k}={v}" for k, v in FEW_SHAPES.items())}); as they
come they fill up over some minutes, to about 900 MiB a rank.

{as_text(memory)}

Made by `make load-http ARGS=--write`.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="A server under many streaming clients, some of which leave.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results/http_load.md")
    options = parser.parse_args()
    result = run_load(options.clients, options.seconds, options.seed)
    report = report_of(result, options.clients)
    Console(width=124).print(report, markup=False, highlight=False)
    problems = result.problems()
    for problem in problems[:20]:
        print(f"http_load: {problem}", file=sys.stderr)
    if options.write and not problems:
        write_result("http_load.md", report)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
