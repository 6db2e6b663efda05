"""Where a step's time goes on a CPU, item by item, and what each item could take at best.

The real leader in this process over a model of random weights (M of `make_models.py`), capture on; every item is timed by
the clock around its function, without those inside it that are items, too. With one thread that is the thread's own CPU
time, which other work on the machine changes little. The limit is the bytes of an item's weights over the read bandwidth of
the same run, or its FLOPs over the rate of torch's bfloat16 product.

    python bench/cpu_step.py [--write]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from gpu_leader import Bench, Leader
from gpu_plan import TOY
from machine import describe, write_result
from model_shapes import SHAPES

from waybill.engine.attention.sdpa import SdpaAttention
from waybill.engine.models.norm_rope import NativeLayerOps, TorchLayerOps
from waybill.engine.routing.capturer import RoutedExpertsCapturer
from waybill.engine.runner.model_runner import ModelRunner
from waybill.engine.scheduler.scheduler import Scheduler
from waybill.parallel.embedding import ParallelLMHead
from waybill.parallel.moe.experts import Experts
from waybill.parallel.moe.router import TopKRouter
from waybill.parallel.weight_format import Matrix

NUM_STEPS = 24
PROMPT = 512
# Functions of every item; the first of a step's is the whole.
ITEMS: list[tuple[str, Any, str]] = [
    ("plan, commit, messages", Scheduler, "step"),
    ("Python of the forward", ModelRunner, "launch"),
    ("linear layers", Matrix, "forward"),
    ("experts", Experts, "forward"),
    ("attention", SdpaAttention, "forward"),
    ("attention", SdpaAttention, "plan"),
    *(("norms", ops, name) for ops in (TorchLayerOps, NativeLayerOps) for name in ("rms_norm", "add_rms_norm")),
    ("head norms, rotary, KV write", TorchLayerOps, "norm_rope_store"),
    ("router and top-k", TopKRouter, "forward"),
    ("head", ParallelLMHead, "forward"),
    ("sampling", ModelRunner, "_sample"),
    ("capture's copy", RoutedExpertsCapturer, "finish"),
]


class Stopwatch:
    """Seconds of every item since the last look."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.seconds: dict[str, float] = defaultdict(float)
        self.touched: list[int] = []
        self._inner = [0.0]

    def wrap(self, item: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if item == "experts":
                self.touched.append(len(args[2].unique()))
            self._inner.append(0.0)
            began = self._clock()
            result = function(*args, **kwargs)
            elapsed = self._clock() - began
            self.seconds[item] += elapsed - self._inner.pop()
            self._inner[-1] += elapsed
            return result

        return timed

    def take(self) -> dict[str, float]:
        taken, self.seconds = self.seconds, defaultdict(float)
        return taken


def time_best(function: Callable[[], object], clock: Callable[[], float]) -> float:
    seconds = []
    for _ in range(10):
        began = clock()
        function()
        seconds.append(clock() - began)
    return min(seconds)


def measure(leader: Leader, stopwatch: Stopwatch, batch: int) -> dict[str, float]:
    """Median seconds of each item in a decode step of `batch` requests; 0 is a prefill."""
    steps = []
    if batch:
        leader.start_decoding(batch)
    for _ in range(NUM_STEPS if batch else 6):
        if not batch:
            leader.send(PROMPT, 1, routed=False)
            leader.wait_for_requests(1)
        stopwatch.take()
        stopwatch.touched.clear()
        leader.scheduler.step() if batch else leader.drain()
        steps.append(stopwatch.take())
    leader.drain()
    return {item: statistics.median(step[item] for step in steps) for item, *_ in ITEMS}


def limits(bench: Bench, touched: float, rows: int, rates: tuple[float, float]) -> dict[str, float]:
    """Seconds at least, of items that weights make: bytes read once, and products."""
    read_bytes_per_s, flops_per_s = rates
    config = bench.model_config
    experts = [module for module in bench.model.modules() if isinstance(module, Experts)]
    inside = {id(matrix) for each in experts for matrix in (each.gate_up, each.down)}
    dense = sum(m.data.numel() for m in bench.model.modules() if isinstance(m, Matrix) and id(m) not in inside)
    of_expert = experts[0].gate_up.data[0].numel() + experts[0].down.data[0].numel()
    routed = len(experts) * touched * of_expert
    pairs = len(experts) * rows * config.moe.top_k * of_expert
    head = config.vocab_size * config.hidden_size
    last = rows if rows < PROMPT else 1
    work = {"linear layers": (dense, rows * dense), "experts": (routed, pairs), "head": (head, last * head)}
    return {name: max(2 * read / read_bytes_per_s, 2 * done / flops_per_s) for name, (read, done) in work.items()}


def table(bench: Bench, leader: Leader, stopwatch: Stopwatch, batch: int, rates: tuple[float, float]) -> list[str]:
    seconds = measure(leader, stopwatch, batch)
    touched = statistics.mean(stopwatch.touched) if stopwatch.touched else 0.0
    least = limits(bench, touched, batch or PROMPT, rates)
    total = sum(seconds.values())
    name = f"decode, {batch} at once" if batch else f"prefill of {PROMPT}"
    lines = ["", f"| {name} | ms | share | limit ms | of the limit |", "| --- | ---: | ---: | ---: | ---: |"]
    for item in sorted(seconds, key=lambda item: -seconds[item]):
        limit = f"{least[item] * 1e3:.2f} | {least[item] / seconds[item]:.0%}" if item in least else " | "
        lines.append(f"| {item} | {seconds[item] * 1e3:.2f} | {seconds[item] / total:.1%} | {limit} |")
    lines.append(f"| all | {total * 1e3:.2f} | 100% | | |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="M", choices=SHAPES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results/cpu_step.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    plan = replace(TOY, shape=SHAPES[options.shape], batches=(1, 8, 32), prefills=(PROMPT,), context=64, num_steps=40)
    bench = Bench(plan, "nowhere")
    long, square = torch.ones(64 << 20), torch.ones(2048, 2048, dtype=torch.bfloat16)
    rates = (long.nbytes / time_best(long.sum, clock), 2 * 2048**3 / time_best(lambda: square @ square, clock))
    stopwatch = Stopwatch(clock)
    lines = [
        "# A step on the CPU, item by item",
        "",
        f"{describe()}, {options.threads} thread(s), shared with other work. Model {options.shape}, bfloat16,",
        f"capture on. Limits of this run: {rates[0] / 1e9:.1f} GB/s read (torch's sum of a long tensor), "
        f"{rates[1] / 1e9:.0f} GFLOP/s (torch's bfloat16 product).",
        f"Medians of {'CPU' if options.threads == 1 else 'wall'} time; an item is timed without the items inside it.",
    ]
    with ExitStack() as stack:
        for item, owner, name in ITEMS:
            stack.enter_context(patch.object(owner, name, stopwatch.wrap(item, getattr(owner, name))))
        leader = stack.enter_context(bench.leader(capture=True))
        for batch in (*plan.batches, 0):
            lines += table(bench, leader, stopwatch, batch, rates)
            print(*lines, sep="\n", flush=True)
    text = "\n".join([*lines, "", "Made by `python bench/cpu_step.py --write`."]) + "\n"
    print(text)
    if options.write:
        write_result("cpu_step.md", text)


if __name__ == "__main__":
    main()
