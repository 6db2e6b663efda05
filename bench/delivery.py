"""What routes cost on their way to an HTTP client: three forms of 32k rows, and HTTP itself beside the in-process engine.

    python bench/make_models.py routing30b --out /tmp/routing30b
    python bench/delivery.py --model /tmp/routing30b [--write]

Delivery: one request of 32,768 prompt tokens (48 layers, top-8 of 128), its prompt in the prefix cache, asked for again and
again; inline int32, inline compact and by reference in turn, in one run; medians. Milliseconds are from the request to
decoded rows in the client's hands, the engine's own part included; `stall` is the longest gap between the tokens of a
neighbour that streams meanwhile. Overhead: tokens/s of 32 requests at once through HTTP and through `waybill.Engine`
in turn, on the embedded model.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from machine import describe, write_result

from waybill import Engine
from waybill.launch.args import EMBEDDED_MODEL

ROOT = Path(__file__).resolve().parents[1]
READY = "waybill is ready: "
NUM_ROWS = 32768
NUM_LAYERS, TOP_K = 48, 8
REPEATS = 7
CONCURRENCY, NUM_TOKENS, PAIRS = 32, 256, 9
MILLI = 1e3


@contextmanager
def serve(*options: str) -> Iterator[str]:
    """A server on a free port; its URL."""
    command = [str(ROOT / "torchrun.sh"), "serve", "--port", "0", "--enable-return-routed-experts", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith(READY)), None)
        if line is None:
            raise RuntimeError("the server did not start")
        yield line.removeprefix(READY).strip()
    finally:
        process.terminate()
        process.wait()


class Neighbour:
    """A process of its own that streams tokens all the time and notes when each arrived."""

    def __init__(self, url: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="waybill-")
        self._file = Path(self._folder.name) / "arrivals"
        command = [sys.executable, __file__, "--model", "", "--neighbour", url, "--out", str(self._file)]
        self._process = subprocess.Popen(command)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._arrivals = np.fromfile(self._file, dtype=np.float64)
        self._folder.cleanup()

    def longest_gap(self, began: float, ended: float) -> float:
        inside = self._arrivals[(self._arrivals > began) & (self._arrivals < ended)]
        return float(np.diff(np.concatenate([[began], inside, [ended]])).max())


def stream_forever(url: str, out: str) -> None:
    """The neighbour's body: the host's monotonic clock at every token."""
    params = {"max_new_tokens": 2000, "ignore_eos": True, "temperature": 0}
    body = {"input_ids": [7], "sampling_params": params, "stream": True}
    with httpx.Client(timeout=None) as http, open(out, "wb", buffering=0) as file:
        while True:
            with http.stream("POST", f"{url}/generate", json=body) as reply:
                for line in reply.iter_lines():
                    if line:
                        file.write(np.float64(time.perf_counter()).tobytes())


def fetch(http: httpx.Client, prompt: list[int], form: str) -> tuple[int, np.ndarray]:
    """Bytes received and decoded rows of one request."""
    body: dict[str, Any] = {
        "input_ids": prompt,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0},
        "return_routed_experts": True,
        "routed_experts_format": "int32" if form == "int32" else "compact",
        "routed_experts_delivery": "reference" if form == "reference" else "inline",
    }
    reply = http.post("/generate", json=body)
    num_bytes = len(reply.content)
    meta = reply.json()["meta_info"]
    if form == "reference":
        raw = http.get(f"/routed_experts/{meta['routed_experts_claim']}").content
        num_bytes += len(raw)
    else:
        raw = base64.b64decode(meta["routed_experts"])
    dtype = "<i4" if form == "int32" else np.uint8
    return num_bytes, np.frombuffer(raw, dtype).reshape(NUM_ROWS, NUM_LAYERS, TOP_K)


def measure_delivery(model: str) -> list[str]:
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 250, NUM_ROWS).tolist()
    seconds: dict[str, list[float]] = {"int32": [], "compact": [], "reference": []}
    spans: dict[str, list[tuple[float, float]]] = {form: [] for form in seconds}
    sizes: dict[str, int] = {}
    rows: dict[str, np.ndarray] = {}
    options = ("--model", model, "--tp", "1", "--context-length", "40000", "--kv-cache-tokens", "81920")
    with serve(*options) as url, httpx.Client(base_url=url, timeout=None) as http:
        fetch(http, prompt, "compact")
        neighbour = Neighbour(url)
        time.sleep(1.0)
        for _ in range(REPEATS):
            for form in seconds:
                began = time.perf_counter()
                sizes[form], rows[form] = fetch(http, prompt, form)
                ended = time.perf_counter()
                seconds[form].append(ended - began)
                spans[form].append((began, ended))
        neighbour.stop()
    if not all(np.array_equal(rows["compact"], other) for other in rows.values()):
        raise RuntimeError("the forms disagree")
    lines = [
        "| 32,768 rows, 48 layers, top-8 | bytes on the wire | bytes a token | ms to decoded rows | stall, ms |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for form, times in seconds.items():
        size = sizes[form]
        gap = statistics.median(neighbour.longest_gap(*span) for span in spans[form])
        lines.append(
            f"| {form} | {size:,} | {size / NUM_ROWS:,.0f} | {statistics.median(times) * MILLI:,.0f} "
            f"| {gap * MILLI:,.0f} |"
        )
    return lines


def prompts_of(pair: int) -> list[list[int]]:
    rng = np.random.default_rng(pair)
    return [rng.integers(0, 250, 32).tolist() for _ in range(CONCURRENCY)]


PARAMS = {"max_new_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0}


async def ask_over_http(url: str, prompts: list[list[int]]) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=httpx.Limits(max_connections=None)) as http:
        bodies = [{"input_ids": prompt, "sampling_params": PARAMS, "return_routed_experts": True} for prompt in prompts]
        await asyncio.gather(*(http.post("/generate", json=body) for body in bodies))


async def ask_engine(engine: Engine, prompts: list[list[int]]) -> None:
    calls = [engine.async_generate(input_ids=p, sampling_params=PARAMS, return_routed_experts=True) for p in prompts]
    await asyncio.gather(*calls)


def rate(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return CONCURRENCY * NUM_TOKENS / (time.perf_counter() - began)


def measure_overhead() -> list[str]:
    """Both engines live at once, one idle while the other is measured."""
    ratios, http_rates, engine_rates = [], [], []
    with serve("--tp", "1") as url, Engine(str(EMBEDDED_MODEL), tp_size=1, enable_return_routed_experts=True) as engine:
        for pair in range(PAIRS + 1):
            prompts = prompts_of(pair)
            over_http = rate(lambda prompts=prompts: asyncio.run(ask_over_http(url, prompts)))
            in_process = rate(lambda prompts=prompts: asyncio.run(ask_engine(engine, prompts)))
            if pair:
                ratios.append(over_http / in_process)
                http_rates.append(over_http)
                engine_rates.append(in_process)
    return [
        f"HTTP beside the in-process `Engine`, {CONCURRENCY} requests at once, {NUM_TOKENS} tokens each with their routes, "
        f"{PAIRS} alternating pairs: {statistics.median(http_rates):,.0f} and {statistics.median(engine_rates):,.0f} "
        f"tokens/s, ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}).",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint of the shape routing30b")
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results/delivery.md")
    parser.add_argument("--neighbour", metavar="URL", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.neighbour:
        stream_forever(options.neighbour, options.out)
    lines = ["# Delivering routes over HTTP", "", describe() + ".", "", *measure_delivery(options.model), ""]
    lines += measure_overhead()
    print("\n".join(lines))
    if options.write:
        write_result("delivery.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
