"""Rounds of prefills and decodes, in which contenders take turns."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from rich.progress import Progress

from waybill import Engine

PREFILLS = (512, 2048)
CONCURRENCIES = (1, 8, 32)
DECODE_PROMPT = 128
SHORT, LONG = 8, 72
MAX_LENGTH = 4096
MIB = 1 << 20
# Ids below are special tokens in most vocabularies.
FIRST_TOKEN = 300


class Contender(Protocol):
    """Generates greedily for a batch of equally long prompts."""

    start_s: float

    def generate(self, prompts: list[list[int]], num_new: int) -> None: ...

    def peak_bytes(self) -> int: ...


class WaybillContender:
    def __init__(self, model_path: str, threads: int, *, routing: bool, tp_size: int = 1) -> None:
        """`threads` are those of each rank."""
        began = time.perf_counter()
        self.engine = Engine(
            model_path,
            tp_size=tp_size,
            num_threads=threads,
            kv_cache_tokens=max(CONCURRENCIES) * 512,
            context_length=MAX_LENGTH,
            enable_return_routed_experts=routing,
        )
        self.start_s = time.perf_counter() - began
        self._routing = routing
        # Routes [R, M, K] of the last answers.
        self.routes: list[np.ndarray] = []

    def generate(self, prompts: list[list[int]], num_new: int) -> None:
        answers = self.engine.generate(
            input_ids=prompts,
            sampling_params={"temperature": 0.0, "max_new_tokens": num_new, "ignore_eos": True},
            return_routed_experts=self._routing,
        )
        if self._routing:
            self.routes = [answer["meta_info"]["routed_experts"] for answer in answers]

    def peak_bytes(self) -> int:
        return int(self.engine.get_server_info()["peak_rss_bytes"])


@dataclass
class Measurement:
    """Seconds by contender and workload, one entry a round."""

    seconds: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))

    def median(self, name: str, workload: str) -> float:
        return statistics.median(self.seconds[name, workload])


def timed(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


class Bench:
    def __init__(self, vocab_size: int, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._vocab_size = vocab_size
        self.measured = Measurement()

    def prompts(self, count: int, length: int) -> list[list[int]]:
        return self._rng.integers(FIRST_TOKEN, self._vocab_size, (count, length)).tolist()

    def round(self, contenders: dict[str, Contender], progress: Callable[[], None]) -> None:
        for length in PREFILLS:
            prompts = self.prompts(1, length)
            for name, contender in contenders.items():
                self._record(name, f"prefill {length}", lambda c=contender, p=prompts: c.generate(p, 1))
                progress()
        for count in CONCURRENCIES:
            for num_new in (SHORT, LONG):
                prompts = self.prompts(count, DECODE_PROMPT)
                for name, contender in contenders.items():
                    workload = f"{count} x {num_new}"
                    self._record(name, workload, lambda c=contender, p=prompts, n=num_new: c.generate(p, n))
                    progress()

    def _record(self, name: str, workload: str, function: Callable[[], None]) -> None:
        self.measured.seconds[name, workload].append(timed(function))

    def prefill_rate(self, name: str, length: int) -> float:
        return length / self.measured.median(name, f"prefill {length}")

    def decode_rate(self, name: str, count: int) -> float:
        seconds = self.measured.median(name, f"{count} x {LONG}") - self.measured.median(name, f"{count} x {SHORT}")
        return count * (LONG - SHORT) / seconds


def run_rounds(bench: Bench, contenders: dict[str, Contender], num_rounds: int) -> None:
    """One more than is kept: the first one warms up."""
    with Progress(transient=True) as progress:
        steps = len(contenders) * (len(PREFILLS) + 2 * len(CONCURRENCIES))
        task = progress.add_task("rounds", total=(num_rounds + 1) * steps)
        for number in range(num_rounds + 1):
            bench.round(contenders, lambda: progress.advance(task))
            if number == 0:
                bench.measured.seconds.clear()


def rates(bench: Bench, name: str) -> dict[str, float]:
    """Tokens per second of one contender."""
    return {
        **{f"prefill_{length}": round(bench.prefill_rate(name, length), 1) for length in PREFILLS},
        **{f"decode_{count}": round(bench.decode_rate(name, count), 1) for count in CONCURRENCIES},
    }
