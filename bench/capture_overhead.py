"""What capturing and shipping routes costs a decode step at concurrency 32: routing on against off, in turns.

Two engines live side by side, one with routing and one without; only one works at a time. A pair runs the same prompts on
both, in an order that alternates; a run's figure is the median interval between the commits of its decode steps, as the
leader of rank 0 timed them. Reported are the median of the pairs' ratios and its confidence interval.

    python bench/capture_overhead.py [--quick] [--json] [--write]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from machine import describe, write_result
from make_models import ensure_checkpoint
from rich.console import Console
from rich.progress import Progress
from step_log import StepEntry
from tapped_engine import TappedEngine
from transformers import AutoConfig

CONCURRENCY = 32
PROMPT_TOKENS = 32
FIRST_TOKEN = 300
ON, OFF = "on", "off"
LAYOUTS = {"dp 1, tp 2": {"dp_size": 1, "tp_size": 2}, "dp 2, tp 1": {"dp_size": 2, "tp_size": 1}}
NUM_RESAMPLES = 4000
CONFIDENCE = 95
MILLI = 1e3


def decode_interval_ms(steps: list[list[StepEntry]], concurrency: int) -> float:
    """Median time between two steps in a row in which every request decodes, over all leaders."""
    sampled: Counter[int] = Counter()
    tokens: Counter[int] = Counter()
    for entry in itertools.chain(*steps):
        sampled[entry.step] += entry.num_sampled
        tokens[entry.step] += entry.num_tokens
    is_full = {step: sampled[step] == tokens[step] == concurrency for step in sampled}
    intervals = [
        entry.committed_s - before.committed_s
        for before, entry in itertools.pairwise(steps[0])
        if is_full[before.step] and is_full[entry.step]
    ]
    assert intervals, "no two steps in a row decoded every request"
    return MILLI * statistics.median(intervals)


@dataclass
class Pairs:
    """Milliseconds a decode step, one entry a pair."""

    on: list[float] = field(default_factory=list)
    off: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> np.ndarray:
        return np.asarray(self.on) / np.asarray(self.off)

    @property
    def overhead(self) -> float:
        """Of the step time, in percent."""
        return 100 * (float(np.median(self.ratios)) - 1)

    def interval(self) -> tuple[float, float]:
        """Bootstrap over pairs, in percent."""
        rng = np.random.default_rng(0)
        picks = rng.integers(0, len(self.on), (NUM_RESAMPLES, len(self.on)))
        tail = (100 - CONFIDENCE) / 2
        low, high = np.percentile(np.median(self.ratios[picks], axis=1), [tail, 100 - tail])
        return 100 * (float(low) - 1), 100 * (float(high) - 1)


class Contenders:
    """An engine with routing and one without."""

    def __init__(self, model_path: str, layout: dict[str, int]) -> None:
        options: dict[str, Any] = {**layout, "kv_cache_tokens": 8192, "context_length": 1024}
        self._engines = {
            ON: TappedEngine(model_path, enable_return_routed_experts=True, **options),
            OFF: TappedEngine(model_path, **options),
        }
        for tapped in self._engines.values():
            tapped.take_steps()
        self.vocab_size = int(self._engines[ON].state["vocab_size"])

    def step_ms(self, name: str, prompts: list[list[int]], num_new: int) -> float:
        tapped = self._engines[name]
        answers = tapped.engine.generate(
            input_ids=prompts,
            sampling_params={"temperature": 0.0, "max_new_tokens": num_new, "ignore_eos": True},
            return_routed_experts=name == ON,
        )
        if name == ON:
            rows = [len(answer["meta_info"]["routed_experts"]) for answer in answers]
            assert rows == [len(prompt) + num_new - 1 for prompt in prompts]
        return decode_interval_ms(tapped.take_steps(), len(prompts))

    def close(self) -> None:
        for tapped in self._engines.values():
            tapped.close()


def measure(model_path: str, layout: dict[str, int], num_pairs: int, num_new: int, label: str) -> Pairs:
    contenders = Contenders(model_path, layout)
    rng = np.random.default_rng(0)
    prompts = rng.integers(FIRST_TOKEN, contenders.vocab_size, (CONCURRENCY, PROMPT_TOKENS)).tolist()
    # Warms up, and leaves the prompts in the prefix caches: every run after it decodes almost from the start.
    for name in (ON, OFF):
        contenders.step_ms(name, prompts, num_new)
    pairs = Pairs()
    with Progress(transient=True) as progress:
        for number in progress.track(range(num_pairs), description=label):
            for name in (ON, OFF) if number % 2 == 0 else (OFF, ON):
                (pairs.on if name == ON else pairs.off).append(contenders.step_ms(name, prompts, num_new))
    contenders.close()
    return pairs


def make_report(results: dict[str, Pairs], model_text: str, num_new: int) -> str:
    lines = [
        "| layout | pairs | routing off, ms a step | routing on, ms a step | overhead, median of pairs | 95 % interval |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for layout, pairs in results.items():
        low, high = pairs.interval()
        lines.append(
            f"| {layout} | {len(pairs.on)} | {statistics.median(pairs.off):.1f} | {statistics.median(pairs.on):.1f} | "
            f"{pairs.overhead:+.2f} % | {low:+.2f} to {high:+.2f} % |"
        )
    table = "\n".join(lines)
    return f"""# What capturing routes costs a decode step

{describe()}.
{model_text}

{CONCURRENCY} requests decode at once, {num_new} tokens each, all of them opted in: captured, filed, sliced and shipped.
Two engines live side by side and work in turns; a pair is one run on each, its figure the median interval between decode
steps.

{table}

Made by `make bench-capture_overhead`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint; that of the shape M, 3.3 GB, made in models/ if not given")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=24, help="decoded by each request in a run")
    parser.add_argument("--quick", action="store_true", help="three pairs, for a look")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--write", action="store_true", help="keep the report in bench/results")
    options = parser.parse_args()
    model_path = options.model or str(ensure_checkpoint("M"))
    num_pairs = 3 if options.quick else options.pairs
    results = {
        label: measure(model_path, layout, num_pairs, options.tokens, label) for label, layout in LAYOUTS.items()
    }
    config = AutoConfig.from_pretrained(model_path)
    model_text = (
        f"Model: {config.num_hidden_layers} layers, hidden {config.hidden_size}, top-{config.num_experts_per_tok} "
        f"of {config.num_experts} experts, bfloat16, random weights."
    )
    text = make_report(results, model_text, options.tokens)
    Console(width=140).print(text, markup=False, highlight=False)
    if options.write and not options.quick:
        write_result("capture_overhead.md", text)
    if options.json:
        figures = {}
        for label, pairs in results.items():
            low, high = pairs.interval()
            figures[label] = {
                "off_ms": round(statistics.median(pairs.off), 3),
                "on_ms": round(statistics.median(pairs.on), 3),
                "overhead_percent": round(pairs.overhead, 3),
                "interval_percent": [round(low, 3), round(high, 3)],
            }
        sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
