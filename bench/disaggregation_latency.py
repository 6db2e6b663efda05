"""What a transfer that arrives, and its finish, do to the requests that run: inter-token latency on a decode's side.

    python bench/disaggregation_latency.py [--rounds 10] [--quick] [--write]

Some requests decode all the time. In a segment of a variant others arrive beside them, one after the other, and finish
after a few tokens:

    none       nobody arrives
    short      as many arrive and finish, with prompts of two tokens: the larger batch alone
    first      their prompts are in the prefill's prefix cache, and they finish with their first token, which comes with the
               pages: a transfer and a finish alone, in a batch that stays as it is
    known      the same, but they go on, so the batch is larger for some steps
    new        the prefill's engine computes them at the same time, on the other core
    inside     no second engine: the decode's engine computes the same prompts itself

Segments take turns, so that whatever else the machine does meets all variants. A latency is the time between two commits
of the leader in which those requests got a token, as its step log has them. Each engine is bound to a core of its own.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from disaggregation_servers import HOST, free_port
from machine import describe, write_result
from make_models import write_config
from step_log import StepEntry
from tapped_engine import TappedEngine

from waybill import Engine
from waybill.launch.node_options import RUN_SECRET_VARIABLE

SHAPE = "T"
VARIANTS = ("none", "first", "short", "known", "new", "inside")
SHORT_TOKENS = 2
NUM_STREAMS, NUM_ARRIVALS = 4, 6
STREAM_TOKENS, ARRIVAL_TOKENS = 160, 4
PROMPT_TOKENS, CHUNK, VOCAB = 512, 128, 500
# Between two arrivals.
PAUSE_S = 0.07
MILLI = 1e3
NUM_RESAMPLES, CONFIDENCE = 2000, 95


def on_core(number: int, make: Any) -> Any:
    """What is started there stays there."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})
    try:
        return make()
    finally:
        os.sched_setaffinity(0, cores)


def latencies(steps: list[StepEntry]) -> list[float]:
    """Seconds between steps in which all streams got a token; the first ones belong to their prefill."""
    times = [step.committed_s for step in steps if step.num_sampled >= NUM_STREAMS]
    return [later - earlier for earlier, later in zip(times[4:], times[5:], strict=False)]


def ratio_interval(segments: list[list[float]], others: list[list[float]]) -> tuple[float, float]:
    """Between which values the ratio of two p99s is, by resampling rounds, which have a segment of each."""
    rng, ratios = np.random.default_rng(0), []
    for _ in range(NUM_RESAMPLES):
        rounds = rng.integers(0, len(segments), len(segments))
        p99, other = (
            np.percentile(np.concatenate([part[index] for index in rounds]), 99) for part in (segments, others)
        )
        ratios.append(p99 / other)
    low, high = np.percentile(ratios, (50 - CONFIDENCE / 2, 50 + CONFIDENCE / 2))
    return float(low), float(high)


@dataclass
class Bench:
    """`seconds` are the latencies of each segment, by variant."""

    model: str
    seconds: dict[str, list[list[float]]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        self.port, self.room = free_port(), 0
        self.rng = np.random.default_rng(0)
        self.threads = ThreadPoolExecutor(64)
        os.environ[RUN_SECRET_VARIABLE] = secrets.token_hex(32)
        options: dict[str, Any] = {
            "load_format": "dummy",
            "dtype": "float32",
            "num_threads": 1,
            "kv_cache_tokens": 16384,
            "chunked_prefill_size": CHUNK,
            "enable_return_routed_experts": True,
        }
        prefill = {"disaggregation": "prefill", "disaggregation_bootstrap_port": self.port, "tp_size": 1}
        decode = {"disaggregation": "decode", "dp_size": 1, "tp_size": 1, "enable_prefix_cache": False}
        self.prefill = on_core(0, lambda: Engine(self.model, **options, **prefill))
        self.decode = on_core(1, lambda: TappedEngine(self.model, **options, **decode))
        self.known = [self.draw() for _ in range(NUM_ARRIVALS)]

    def draw(self) -> list[int]:
        return self.rng.integers(1, VOCAB, PROMPT_TOKENS).tolist()

    def ask(self, engine: Engine, ids: list[int], num_tokens: int, **place: Any) -> Any:
        params = {"temperature": 0.0, "max_new_tokens": num_tokens, "ignore_eos": True}
        return engine.generate(input_ids=ids, sampling_params=params, return_routed_experts=True, **place)

    def arrive(self, variant: str, number: int) -> None:
        ids = self.known[number] if variant in ("first", "known") else self.draw()
        if variant in ("short", "inside"):
            self.ask(self.decode.engine, ids[:SHORT_TOKENS] if variant == "short" else ids, ARRIVAL_TOKENS)
            return
        self.room += 1
        place = {"bootstrap_host": HOST, "bootstrap_port": self.port, "bootstrap_room": self.room}
        num_tokens = 1 if variant == "first" else ARRIVAL_TOKENS
        prompt = self.threads.submit(self.ask, self.prefill, ids, num_tokens, **place)
        self.ask(self.decode.engine, ids, num_tokens, **place)
        prompt.result()

    def segment(self, variant: str, *, kept: bool = True) -> None:
        self.decode.take_steps()
        streams = [
            self.threads.submit(self.ask, self.decode.engine, self.draw()[:8], STREAM_TOKENS)
            for _ in range(NUM_STREAMS)
        ]
        time.sleep(PAUSE_S)
        arrivals = []
        for number in range(NUM_ARRIVALS if variant != "none" else 0):
            if all(stream.done() for stream in streams):
                break
            arrivals.append(self.threads.submit(self.arrive, variant, number))
            time.sleep(PAUSE_S)
        for future in (*streams, *arrivals):
            future.result()
        (steps,) = self.decode.take_steps()
        if kept:
            self.seconds[variant].append(latencies(steps))

    def close(self) -> None:
        self.decode.close()
        self.prefill.shutdown()


def report(bench: Bench, rounds: int, load: float, seconds: float) -> str:
    seconds_of = {variant: np.concatenate(bench.seconds[variant]) for variant in VARIANTS}
    base, short = (np.percentile(seconds_of[name], (50, 99)) * MILLI for name in ("none", "short"))
    lines = [
        "# Arriving transfers and the requests that run",
        "",
        "    python bench/disaggregation_latency.py --write",
        "",
        f"{describe()}. Shape `{SHAPE}`, random weights, float32, an engine on each of two cores; {rounds} rounds of a "
        f"segment of each variant, {seconds:.0f} s. {NUM_STREAMS} requests run; in a segment {NUM_ARRIVALS} others arrive, "
        f"of {PROMPT_TOKENS} tokens in chunks of {CHUNK}, and finish after {ARRIVAL_TOKENS}. Load average when "
        f"it began: {load:.1f}; shared memory. Other work on the machine makes tails in all variants, which take turns.",
        "",
        "| who arrives | latencies | p50, ms | p99, ms | p50 of none | p99 of none "
        f"| between ({CONFIDENCE} %) | p99 of short |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for variant in VARIANTS:
        values = seconds_of[variant] * MILLI
        found = np.percentile(values, (50, 99))
        ratios = found / base
        low, high = ratio_interval(bench.seconds[variant], bench.seconds["none"])
        lines.append(
            f"| {variant} | {len(values)} | {found[0]:.2f} | {found[1]:.2f} | {ratios[0]:.2f} | {ratios[1]:.2f} "
            f"| {low:.2f} - {high:.2f} | {found[1] / short[1]:.2f} |"
        )
    lines += [
        "",
        f"*none*: nobody. *short*: as many, with prompts of {SHORT_TOKENS} tokens, inside: what a larger batch "
        "costs for some steps, without a transfer. *first*: their prompts are in the prefill's prefix cache, and they "
        "finish with their first token, which comes with the pages: a transfer and a finish alone, in a batch that stays "
        "as it is. *known*: the same, but they go on. *new*: the prefill's engine computes them meanwhile. *inside*: the "
        "decode's computes the same prompts itself.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="segments of each variant")
    parser.add_argument("--minutes", type=float, default=60.0, help="no round begins later")
    parser.add_argument("--quick", action="store_true", help="one round, for a look")
    parser.add_argument("--write", action="store_true", help="keep the report in bench/results/disaggregation.md")
    options = parser.parse_args()
    load, began = os.getloadavg()[0], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="waybill-") as model:
        write_config(SHAPE, Path(model))
        bench = Bench(model)
        try:
            for variant in ("known", "new", "inside"):
                bench.segment(variant, kept=False)
            num_rounds = 0
            while num_rounds < (1 if options.quick else options.rounds):
                if num_rounds and time.monotonic() > began + 60 * options.minutes:
                    break
                # In another order each time.
                for variant in bench.rng.permutation(VARIANTS):
                    bench.segment(str(variant))
                num_rounds += 1
        finally:
            bench.close()
    text = report(bench, num_rounds, load, time.monotonic() - began)
    print(text, flush=True)
    if options.write:
        write_result("disaggregation.md", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
