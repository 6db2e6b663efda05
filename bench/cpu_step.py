"""Where a step's time goes on a CPU, item by item, and what each item could take at best.

The real leader in this process over a model of random weights (M of `make_models.py`), capture on; every item is timed by
the clock around its function, without those inside it that are items, too. With one thread that is the thread's own CPU
time, which other work on the machine changes little. Instruction sets of the C++ operators, and torch without them ("off"),
take steps in turn. The limit is the bytes of an item's weights over the read bandwidth of the same run, or its FLOPs over
the highest rate at which any of them, or torch, multiplied.

    python bench/cpu_step.py [--sets off avx2 avx512] [--write]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
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
from waybill.parallel.cpu_ops.library import SWITCH, chosen_set, load_operators
from waybill.parallel.embedding import ParallelLMHead
from waybill.parallel.moe.experts import Experts
from waybill.parallel.moe.router import TopKRouter
from waybill.parallel.weight_format import Matrix, WeightFormat

NUM_STEPS, NUM_PROMPTS = 24, 6
PROMPTS = (512, 2048)
# Functions of every item; the first of a step's is the whole.
ITEMS: list[tuple[str, Any, str]] = [
    ("plan, commit, messages", Scheduler, "step"),
    ("Python of the forward", ModelRunner, "launch"),
    ("linear layers", Matrix, "forward"),
    ("experts", Experts, "forward"),
    ("attention", SdpaAttention, "forward"),
    ("attention", SdpaAttention, "plan"),
    *(("norms", ops, name) for ops in (TorchLayerOps, NativeLayerOps) for name in ("rms_norm", "add_rms_norm")),
    *(("head norms, rotary, KV write", ops, "norm_rope_store") for ops in (TorchLayerOps, NativeLayerOps)),
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


def use(name: str) -> None:
    """From now on the operators are those of an instruction set, or none."""
    os.environ[SWITCH] = name
    if chosen_set(name) is not None and not load_operators():
        raise SystemExit(f"{SWITCH}={name}: the operators could not be built")


@dataclass(frozen=True)
class Workload:
    """A decode step of so many requests, or one prompt."""

    batch: int = 0
    prompt: int = 0

    @property
    def name(self) -> str:
        return f"decode, {self.batch} at once" if self.batch else f"prefill of {self.prompt}"

    @property
    def rows(self) -> int:
        return self.batch or self.prompt


def measure(leaders: dict[str, Leader], stopwatch: Stopwatch, work: Workload) -> dict[str, dict[str, float]]:
    """Median seconds of each item in a step of the workload, by the leaders' names; they take steps in turn."""
    steps: dict[str, list[dict[str, float]]] = defaultdict(list)
    if work.batch:
        for name, leader in leaders.items():
            use(name)
            leader.start_decoding(work.batch)
    stopwatch.touched.clear()
    for _ in range(NUM_STEPS if work.batch else NUM_PROMPTS):
        for name, leader in leaders.items():
            use(name)
            if work.prompt:
                leader.send(work.prompt, 1, routed=False)
                leader.wait_for_requests(1)
            stopwatch.take()
            leader.scheduler.step() if work.batch else leader.drain()
            steps[name].append(stopwatch.take())
    for name, leader in leaders.items():
        use(name)
        leader.drain()
    return {
        name: {item: statistics.median(step[item] for step in each) for item, *_ in ITEMS}
        for name, each in steps.items()
    }


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
    last = rows if rows < min(PROMPTS) else 1
    work = {"linear layers": (dense, rows * dense), "experts": (routed, pairs), "head": (head, last * head)}
    return {name: max(2 * read / read_bytes_per_s, 2 * done / flops_per_s) for name, (read, done) in work.items()}


def table(
    bench: Bench, leaders: dict[str, Leader], stopwatch: Stopwatch, work: Workload, rates: tuple[float, float]
) -> list[str]:
    """Milliseconds of each item by leader; share, limit and the rate to the first are the last leader's."""
    seconds = measure(leaders, stopwatch, work)
    touched = statistics.mean(stopwatch.touched) if stopwatch.touched else 0.0
    least = limits(bench, touched, work.rows, rates)
    last, first = seconds[list(leaders)[-1]], seconds[next(iter(leaders))]
    total = sum(last.values())
    headings = [work.name, *(f"{name} ms" for name in leaders), "first / last", "share", "limit ms", "of the limit"]
    lines = ["", row(headings), row(["---", *["---:"] * (len(headings) - 1)])]
    for item in sorted(last, key=lambda item: -last[item]):
        own = last[item]
        limit = (f"{least[item] * 1e3:.2f}", f"{least[item] / own:.0%}") if item in least else ("", "")
        each = (f"{seconds[name][item] * 1e3:.2f}" for name in leaders)
        lines.append(row([item, *each, f"{first[item] / own:.2f}", f"{own / total:.1%}", *limit]))
    shares = (f"{sum(first.values()) / total:.2f}", "100%", "", "")
    lines.append(row(["all", *(f"{sum(each.values()) * 1e3:.2f}" for each in seconds.values()), *shares]))
    return lines


def row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def measure_rates(sets: list[str], clock: Callable[[], float]) -> tuple[float, float]:
    """Bytes per second that are read, and floating-point operations per second of the fastest product."""
    long, square = torch.ones(64 << 20), torch.ones(1024, 1024, dtype=torch.bfloat16)
    products = []
    for name in sets:
        use(name)
        linear = WeightFormat(torch.bfloat16, torch.device("cpu")).linear()
        products.append(time_best(lambda linear=linear: linear(square, square, None), clock))
    return long.nbytes / time_best(long.sum, clock), 2 * 1024**3 / min(products)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="M", choices=SHAPES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sets", nargs="+", default=["off", "auto"], help="values of WAYBILL_CPU_OPERATORS")
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results/cpu_step.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    plan = replace(TOY, shape=SHAPES[options.shape], batches=(1, 8, 32), prefills=PROMPTS, context=64, num_steps=40)
    rates = measure_rates(options.sets, clock)
    stopwatch = Stopwatch(clock)
    lines = [
        "# A step on the CPU, item by item",
        "",
        f"{describe()}, {options.threads} thread(s), shared with other work. Model {options.shape}, bfloat16,",
        f'capture on. "auto" is {chosen_set("auto")}; "off" is torch. Limits of this run:',
        f"{rates[0] / 1e9:.1f} GB/s read (torch's sum of a long tensor), {rates[1] / 1e9:.0f} GFLOP/s (the fastest",
        f"bfloat16 product). Medians of {'CPU' if options.threads == 1 else 'wall'} time over steps taken in turn; an item",
        "is timed without the items inside it.",
    ]
    with ExitStack() as stack:
        for item, owner, name in ITEMS:
            stack.enter_context(patch.object(owner, name, stopwatch.wrap(item, getattr(owner, name))))
        leaders = {}
        for name in options.sets:
            use(name)
            bench = Bench(plan, "nowhere")
            leaders[name] = stack.enter_context(bench.leader(capture=True))
        for work in (*map(Workload, plan.batches), *(Workload(prompt=length) for length in PROMPTS)):
            lines += table(bench, leaders, stopwatch, work, rates)
            print(*lines[-20:], sep="\n", flush=True)
    options_given = "" if options.sets == parser.get_default("sets") else f" --sets {' '.join(options.sets)}"
    text = "\n".join([*lines, "", f"Made by `python bench/cpu_step.py{options_given} --write`."]) + "\n"
    print(text)
    if options.write:
        write_result("cpu_step.md", text)


if __name__ == "__main__":
    main()
