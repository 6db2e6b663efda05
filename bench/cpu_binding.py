"""Decode of one engine whose processes are bound to cores and let free again while it lives, in turns.

    python bench/make_models.py M --out models/M
    python bench/cpu_binding.py --model models/M [--tp 2] [--rounds 7] [--write]

`--cpu-threads-bind` binds an engine when it starts. Here its threads are bound afterwards, so that all ways have the same
processes, weights and memory, and what else the machine does touches them alike. Twice in a round nothing is bound: how far
these two are apart is what the machine alone does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Set
from contextlib import suppress

import numpy as np
import psutil
from machine import describe, write_result
from rich.console import Console

from waybill import Engine

NOT_BOUND = "not bound"
RANKS = "ranks on cores of their own"
STEP_THREADS = "step threads alone on cores of their own"
OTHERS = "ranks not bound, other processes on the last core"
WAYS = (NOT_BOUND, RANKS, STEP_THREADS, OTHERS, f"{NOT_BOUND}, again")
# Requests at once, and the tokens of each.
WORKLOADS = {1: 48, 8: 24}
PROMPT_LENGTH = 16
# Ids below are special tokens in most vocabularies.
FIRST_TOKEN, LAST_TOKEN = 300, 30_000
WARM_UP_TOKENS = 8

# By way and requests at once, one entry a round.
Rates = dict[tuple[str, int], list[float]]


class BoundEngine:
    """An engine and where its threads run. This program is its frontend, and is bound with the other processes."""

    def __init__(self, model: str, tp_size: int) -> None:
        self.cores = sorted(os.sched_getaffinity(0))
        self._engine = Engine(
            model,
            tp_size=tp_size,
            kv_cache_tokens=32768,
            enable_return_routed_experts=True,
            enable_prefix_cache=False,
        )
        self._processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        self._rng = np.random.default_rng(0)
        found = [process for process in self._processes if "waybill.launch.worker" in process.cmdline()]
        # The agent's command line has the ranks' in it.
        ranks = {int(p.environ()["RANK"]): p.pid for p in found if "waybill.launch.agent" not in p.cmdline()}
        shares = np.array_split(self.cores, tp_size)
        self._cores_of_rank = {ranks[rank]: set(share.tolist()) for rank, share in enumerate(shares)}

    def bind(self, way: str) -> None:
        """Threads that start later keep to the cores of those that start them."""
        for process in self._processes:
            for thread in process.threads():
                # Threads come and go.
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(thread.id, self._cores(way, process.pid, thread.id))

    def _cores(self, way: str, pid: int, thread: int) -> Set[int]:
        own = self._cores_of_rank.get(pid)
        if way == OTHERS and own is None:
            return {self.cores[-1]}
        # A process' first thread is its step thread.
        if own is not None and (way == RANKS or (way == STEP_THREADS and thread == pid)):
            return own
        return set(self.cores)

    def decode(self, count: int, num_new: int) -> float:
        """Tokens per second, prompts and routes included."""
        began = time.perf_counter()
        self._engine.generate(
            input_ids=self._rng.integers(FIRST_TOKEN, LAST_TOKEN, (count, PROMPT_LENGTH)).tolist(),
            sampling_params={"temperature": 0.0, "max_new_tokens": num_new, "ignore_eos": True},
            return_routed_experts=True,
        )
        return count * num_new / (time.perf_counter() - began)

    def shutdown(self) -> None:
        self._engine.shutdown()


def run_rounds(engine: BoundEngine, num_rounds: int) -> Rates:
    """Every round begins with another way."""
    rates: Rates = defaultdict(list)
    for count in WORKLOADS:
        engine.decode(count, WARM_UP_TOKENS)
    for number in range(num_rounds):
        first = number % len(WAYS)
        for way in (*WAYS[first:], *WAYS[:first]):
            engine.bind(way)
            for count, num_new in WORKLOADS.items():
                rates[way, count].append(engine.decode(count, num_new))
    return rates


def make_report(rates: Rates, options: argparse.Namespace, cores: list[int]) -> str:
    lines = [
        f"| requests at once | {options.tp} ranks on {len(cores)} cores | tokens/s | over not bound | of single rounds |",
        "| ---: | --- | ---: | ---: | ---: |",
    ]
    for count in WORKLOADS:
        for way in WAYS:
            found = rates[way, count]
            ratios = [rate / base for rate, base in zip(found, rates[NOT_BOUND, count], strict=True)]
            spread = f"{min(ratios):.2f} .. {max(ratios):.2f}"
            lines.append(
                f"| {count} | {way} | {statistics.median(found):.1f} | {statistics.median(ratios):.3f} | {spread} |"
            )
    table = "\n".join(lines)
    return f"""# Ranks bound to cores

{describe()}. {options.tp} ranks, threads of each: {max(1, len(cores) // options.tp)}. Decode with routes.
Medians of {options.rounds} rounds on one engine, whose threads are bound anew for each line; ratios are those of single
rounds, in which the lines take turns.

{table}

Made by `python bench/cpu_binding.py --model MODEL --tp {options.tp} --rounds {options.rounds} --write`, the model by
`python bench/make_models.py M`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Decode with ranks bound to cores, and not.")
    parser.add_argument("--model", required=True, help="checkpoint folder in bfloat16")
    parser.add_argument("--tp", type=int, default=2, help="tensor-parallel ranks, at most one a core")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results/cpu_binding.md")
    options = parser.parse_args()
    if not 1 <= options.tp <= len(os.sched_getaffinity(0)):
        parser.error(f"--tp {options.tp}: must lie in 1 .. {len(os.sched_getaffinity(0))}, a core for each rank")
    engine = BoundEngine(options.model, options.tp)
    rates = run_rounds(engine, options.rounds)
    report = make_report(rates, options, engine.cores)
    Console(width=124).print(report, markup=False, highlight=False)
    if options.write:
        write_result("cpu_binding.md", report)
    engine.shutdown()


if __name__ == "__main__":
    main()
