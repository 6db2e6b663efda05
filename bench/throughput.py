"""Prefill and decode of the engine beside `transformers`' own generate, on one model and the same threads, in one run.

The engine runs as its users run it: ranks under torchrun, routing captured and shipped with every answer (`waybill`),
and once more without routing (`waybill, routing off`). Rounds are interleaved, so that what else the machine does touches
all alike; medians are reported. Decode speed is (long - short) / time difference of two generations that differ only in
length; each prompt is new, so that no prefix is cached.

    python bench/make_models.py M --out models/M
    python bench/throughput.py --model models/M [--rounds 3] [--write]
    python bench/throughput.py --model models/M --peers --vllm-python PYTHON [--vllm-preload LIB ...] [--rounds 5]

The bandwidth limit counts what a decode step must read: every dense weight, the experts that its tokens were routed to
(from the shipped routes), and the keys and values, over the read bandwidth measured in the same run.
With `--peers` the other side is vLLM, see `peers.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from io import StringIO
from typing import Any

import numpy as np
import torch
from machine import describe, write_result
from peers import compare
from rich import box
from rich.console import Console
from rich.table import Table
from throughput_rounds import (
    CONCURRENCIES,
    DECODE_PROMPT,
    LONG,
    MIB,
    PREFILLS,
    Bench,
    Contender,
    WaybillContender,
    rates,
    run_rounds,
    timed,
)
from transformers import AutoConfig, AutoModelForCausalLM

BASELINE = "transformers grouped_mm"


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


def read_bandwidth(threads: int) -> float:
    """Bytes per second that this many threads read from memory at best: torch's sum of a long tensor."""
    torch.set_num_threads(threads)
    long = torch.ones(256 * MIB // 4)
    return long.nbytes / min(timed(long.sum) for _ in range(8))


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


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Prefill and decode beside transformers or vLLM on a CPU.")
    parser.add_argument("--model", required=True, help="checkpoint folder in bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results/{throughput,peers}.md")
    parser.add_argument("--peers", action="store_true", help="beside vLLM, in place of transformers")
    parser.add_argument("--vllm-python", help="the Python that vLLM is installed for")
    parser.add_argument("--vllm-preload", nargs="*", default=[], help="libraries for vLLM's LD_PRELOAD")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2], help="tensor-parallel sizes beside vLLM")
    options = parser.parse_args()
    if options.peers and options.vllm_python is None:
        parser.error("--peers needs --vllm-python")
    return options


def main() -> None:
    options = parse_options()
    if options.peers:
        compare(options)
        return
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
