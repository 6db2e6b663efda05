"""Prefill and decode of the engine beside `transformers`' own generate, on one model and the same threads, in one run.

The engine runs as its users run it: ranks under torchrun, routing captured and shipped with every answer (`waybill`),
and once more without routing (`waybill, routing off`). Rounds are interleaved, so that what else the machine does touches
all alike; medians are reported. Decode speed is (long - short) / time difference of two generations that differ only in
length; each prompt is new, so that no prefix is cached.

    python bench/make_models.py M --out models/M
    python bench/throughput.py --model models/M [--rounds 3] [--write]

The bandwidth limit counts what a decode step must read: every dense weight, the experts that its tokens were routed to
(from the shipped routes), and the keys and values, over the read bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from io import StringIO
from typing import Any, Protocol

import numpy as np
import torch
from machine import describe, write_result
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from waybill import Engine

PREFILLS = (512, 2048)
CONCURRENCIES = (1, 8, 32)
DECODE_PROMPT = 128
SHORT, LONG = 8, 72
MIB = 1 << 20
# Ids below are special tokens in most vocabularies.
FIRST_TOKEN = 300
BASELINE = "transformers grouped_mm"


class Contender(Protocol):
    """Generates greedily for a batch of equally long prompts."""

    start_s: float

    def generate(self, prompts: list[list[int]], num_new: int) -> None: ...

    def peak_bytes(self) -> int: ...


class WaybillContender:
    def __init__(self, model_path: str, threads: int, *, routing: bool) -> None:
        began = time.perf_counter()
        self.engine = Engine(
            model_path,
            tp_size=1,
            num_threads=threads,
            kv_cache_tokens=max(CONCURRENCIES) * 512,
            context_length=4096,
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


class TransformersContender:
    def __init__(self, model_path: str) -> None:
        began = time.perf_counter()
        self._model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=torch.bfloat16, experts_implementation="grouped_mm", attn_implementation="sdpa"
        ).eval()
        self.start_s = time.perf_counter() - began

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], num_new: int) -> None:
        ids = torch.tensor(prompts)
        self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False
        )

    def peak_bytes(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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


def read_bandwidth(threads: int) -> float:
    """Bytes per second that this many threads read from memory at best: torch's sum of a long tensor."""
    torch.set_num_threads(threads)
    long = torch.ones(256 * MIB // 4)
    return long.nbytes / min(timed(long.sum) for _ in range(8))


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


def decode_step_bytes(config: Any, routes: list[np.ndarray], prompt_length: int) -> float:
    """Bytes that one decode step of these requests must read, on average; bfloat16."""
    width = config.hidden_size
    heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    attention = width * heads + config.num_attention_heads * config.head_dim * width
    router = width * config.num_experts
    dense = config.num_hidden_layers * (attention + router) + config.vocab_size * width
    expert = 3 * width * config.moe_intermediate_size
    # Row prompt_length + i of every request is routed in decode step i.
    decoded = np.stack([rows[prompt_length:] for rows in routes])
    unique = [
        len(np.unique(decoded[:, step, layer])) for step in range(decoded.shape[1]) for layer in range(decoded.shape[2])
    ]
    experts = expert * statistics.mean(unique) * decoded.shape[2]
    kv_per_token = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
    kv = kv_per_token * len(routes) * (prompt_length + decoded.shape[1] / 2)
    return 2 * (dense + experts + kv)


def make_table(bench: Bench, contenders: dict[str, Contender], limits: dict[int, float]) -> Table:
    table = Table(box=box.MARKDOWN)
    for heading in ("workload", "contender", "tokens/s", "this / transformers", "of the bandwidth limit"):
        table.add_column(heading, justify="left" if heading in ("workload", "contender") else "right")
    for length in PREFILLS:
        base = bench.prefill_rate(BASELINE, length)
        for name in contenders:
            rate = bench.prefill_rate(name, length)
            table.add_row(f"prefill {length}", name, f"{rate:.0f}", f"{rate / base:.2f}", "")
    for count in CONCURRENCIES:
        base = bench.decode_rate(BASELINE, count)
        for name in contenders:
            rate = bench.decode_rate(name, count)
            table.add_row(
                f"decode, {count} at once", name, f"{rate:.1f}", f"{rate / base:.2f}", f"{rate / limits[count]:.0%}"
            )
    return table


def as_text(table: Table) -> str:
    console = Console(width=120, file=StringIO(), record=True)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.export_text().strip().splitlines())


def run_rounds(bench: Bench, contenders: dict[str, Contender], num_rounds: int) -> None:
    """One more than is kept: the first one warms up."""
    with Progress(transient=True) as progress:
        steps = len(contenders) * (len(PREFILLS) + 2 * len(CONCURRENCIES))
        task = progress.add_task("rounds", total=(num_rounds + 1) * steps)
        for number in range(num_rounds + 1):
            bench.round(contenders, lambda: progress.advance(task))
            if number == 0:
                bench.measured.seconds.clear()


def decode_limits(bench: Bench, waybill: WaybillContender, config: Any, bandwidth: float) -> dict[int, float]:
    """Tokens per second at most, by the number of requests: what their steps must read, over the bandwidth."""
    limits: dict[int, float] = {}
    for count in CONCURRENCIES:
        waybill.generate(bench.prompts(count, DECODE_PROMPT), LONG)
        limits[count] = count * bandwidth / decode_step_bytes(config, waybill.routes, DECODE_PROMPT)
    return limits


def memory_table(contenders: dict[str, Contender]) -> Table:
    table = Table("contender", "start-up s", "peak memory MiB", box=box.MARKDOWN)
    for name, contender in contenders.items():
        table.add_row(name, f"{contender.start_s:.1f}", f"{contender.peak_bytes() / MIB:.0f}")
    return table


def make_report(options: argparse.Namespace, config: Any, bandwidth: float, speed: Table, memory: Table) -> str:
    weights = sum(entry.stat().st_size for entry in os.scandir(options.model) if entry.name.endswith(".safetensors"))
    return f"""# Throughput beside transformers

{describe()}, {options.threads} threads. Model: {weights / MIB:.0f} MiB of bfloat16 weights,
{config.num_hidden_layers} layers, hidden {config.hidden_size}, {config.num_experts} experts.
Medians of {options.rounds} interleaved rounds.
Read bandwidth of this run: {bandwidth / 1e9:.1f} GB/s (torch's sum of a long tensor).

{as_text(speed)}

`waybill` ships the routes of every token with each answer. Memory is the peak resident memory of the rank's process
(weights are {weights / MIB:.0f} MiB of it), or of the process that runs transformers; start-up is the time until the
first request can be sent, processes and torchrun included.

{as_text(memory)}

Made by `python bench/throughput.py --model MODEL --write`, the model by `python bench/make_models.py M`.
"""


def rates(bench: Bench, name: str) -> dict[str, float]:
    """Tokens per second of one contender."""
    return {
        **{f"prefill_{length}": round(bench.prefill_rate(name, length), 1) for length in PREFILLS},
        **{f"decode_{count}": round(bench.decode_rate(name, count), 1) for count in CONCURRENCIES},
    }


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Prefill and decode beside transformers on a CPU.")
    parser.add_argument("--model", required=True, help="checkpoint folder in bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results/throughput.md")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    bandwidth = read_bandwidth(options.threads)
    config = AutoConfig.from_pretrained(options.model)
    waybill = WaybillContender(options.model, options.threads, routing=True)
    unrouted = WaybillContender(options.model, options.threads, routing=False)
    contenders: dict[str, Contender] = {
        "waybill": waybill,
        "waybill, routing off": unrouted,
        BASELINE: TransformersContender(options.model),
    }
    bench = Bench(config.vocab_size, seed=0)
    run_rounds(bench, contenders, options.rounds)
    limits = decode_limits(bench, waybill, config, bandwidth)
    speed = make_table(bench, contenders, limits)
    report = make_report(options, config, bandwidth, speed, memory_table(contenders))
    Console(width=124).print(report, markup=False, highlight=False)
    if options.write:
        write_result("throughput.md", report)
    if options.json:
        tokens_per_s = {name: rates(bench, name) for name in contenders}
        decode_limit = {count: round(limit, 1) for count, limit in limits.items()}
        print(json.dumps({"tokens_per_s": tokens_per_s, "decode_limit": decode_limit}))
    for contender in (waybill, unrouted):
        contender.engine.shutdown()


if __name__ == "__main__":
    main()
