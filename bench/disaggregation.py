"""Prefill on one GPU and decode on another: how fast keys and values get there, and what the first token costs.

    python bench/disaggregation.py                              two CUDA devices that reach each other, some three minutes
    python bench/disaggregation.py --transport tcp              the same over TCP
    python bench/disaggregation.py --device cpu --quick         a dry run on the CPU
    python bench/disaggregation.py --write                      keeps the report in bench/results/disaggregation_gpu.md
    python bench/disaggregation.py --device cpu --rows --against PYTHON

Two servers (torchrun, processes, sockets) of the shape of Qwen3-30B-A3B with random weights, and a client of this process
that asks both as a router does. The link's rate is that of torch's copy of 1 GiB between the two devices, in the same run;
the rate of keys and values is bytes by the time that the decode's rank copies, as it counts both.

*New* prompts are computed while the transfer goes on, chunk by chunk. *Known* ones are in the prefill's prefix cache, so
that all of their positions are to be had at once; the decode's side has no prefix cache. One GPU is the prefill's server,
asked without a room: then it does both, as any engine. Medians.

`--rows` is for what rows cost alone: a model that routes as Qwen3-30B-A3B does and is tiny otherwise, and known prompts.
`--against` names the python of another checkout's environment, whose pair is asked in turns with this one's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from disaggregation_servers import Answer, ServerPair
from machine import describe, write_result
from make_models import write_config
from marked_results import say

GIB, MILLI = 2**30, 1e3
NEW_TOKENS = 8
NUM_COPIES = 9
WITH_ROWS = "--enable-return-routed-experts"


@dataclass(frozen=True)
class Plan:
    shape: str
    prompts: tuple[int, ...]
    repeats: int
    chunk: int
    # Of the copy that the link is measured by.
    link_bytes: int
    vocab: int


FULL = Plan("30b", (2048, 8192, 32768), 5, 2048, GIB, 150000)
QUICK = Plan("toy30b", (64, 256), 2, 64, GIB // 64, 256)
ROWS = Plan("routing30b", (8192, 32768), 15, 2048, GIB // 64, 500)


@dataclass
class Times:
    """Of prompts of one length, in seconds until the first token."""

    one: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)

    def row(self) -> tuple[float, float]:
        return statistics.median(self.one) * MILLI, statistics.median(self.both) * MILLI


def link_rate(plan: Plan, device: str) -> float:
    """Bytes per second of a copy from the first device to the second one."""
    names = ("cuda:0", "cuda:1") if device == "cuda" else ("cpu", "cpu")
    source, target = (torch.ones(plan.link_bytes, dtype=torch.uint8, device=name) for name in names)
    seconds = []
    for _ in range(NUM_COPIES):
        if device == "cuda":
            torch.cuda.synchronize(0)
            torch.cuda.synchronize(1)
        began = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize(0)
            torch.cuda.synchronize(1)
        seconds.append(time.perf_counter() - began)
    del source, target
    if device == "cuda":
        torch.cuda.empty_cache()
    return plan.link_bytes / statistics.median(seconds)


COUNTERS = ("transferred_bytes", "transferred_shared_bytes", "transfer_seconds", "transfer_copy_seconds")


@dataclass
class Counted:
    """What the decode's side has counted."""

    values: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def now(pair: ServerPair) -> Counted:
        state = pair.decode.state()
        return Counted({name: float(state[name]) for name in COUNTERS})

    def since(self, before: Counted) -> dict[str, float]:
        return {name: value - before.values[name] for name, value in self.values.items()}


class Bench:
    def __init__(self, pair: ServerPair, plan: Plan) -> None:
        self.pair = pair
        self.plan = plan
        self._rng = np.random.default_rng(0)
        self.num_equal = self.num_compared = 0

    def prompt(self, length: int) -> dict[str, Any]:
        ids = self._rng.integers(1, self.plan.vocab, length).tolist()
        params = {"temperature": 0.0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
        return {"input_ids": ids, "sampling_params": params}

    def warm_up(self) -> None:
        """Kernels are compiled, pools are mapped."""
        for length in self.plan.prompts:
            self.pair.prefill.stream(self.prompt(length))
            self.pair.stream(self.prompt(length))

    def compare(self, one: Answer, both: Answer) -> None:
        self.num_compared += 1
        self.num_equal += one.output_ids == both.output_ids

    def measure(self, length: int) -> dict[str, Any]:
        """By turns, so that whatever else happens on the machine meets all of them."""
        new, known, of_known, of_new = Times(), Times(), [], []
        for _ in range(self.plan.repeats):
            first, other = self.prompt(length), self.prompt(length)
            new.one.append(self.pair.prefill.stream(first).first_s)
            before = Counted.now(self.pair)
            new.both.append(self.pair.stream(other).first_s)
            middle = Counted.now(self.pair)
            of_new.append(middle.since(before))
            alone, both = self.pair.prefill.stream(first), self.pair.stream(first)
            known.one.append(alone.first_s)
            known.both.append(both.first_s)
            of_known.append(Counted.now(self.pair).since(middle))
            # Both compute the last token of the prompt by itself, and so round alike.
            self.compare(alone, both)
        found: dict[str, Any] = {"tokens": length, "new_ms": new.row(), "known_ms": known.row()}
        for name, counted in (("new", of_new), ("known", of_known)):
            num_bytes = sum(each["transferred_bytes"] for each in counted)
            rates = [each["transferred_bytes"] / each["transfer_copy_seconds"] for each in counted]
            transfer_s = sum(each["transfer_seconds"] for each in counted)
            found[f"{name}_bytes"] = num_bytes / len(counted)
            found[f"{name}_copy_rate"] = statistics.median(rates)
            found[f"{name}_transfer_ms"] = transfer_s / len(counted) * MILLI
            found[f"{name}_shared"] = sum(each["transferred_shared_bytes"] for each in counted) / num_bytes
        say("prompts", **found)
        return found


def report(found: list[dict[str, Any]], rate: float, bench: Bench, options: argparse.Namespace, seconds: float) -> str:
    where = "two GPUs" if options.device == "cuda" else "the CPU, a dry run"
    lines = [
        f"# Prefill and decode apart, on {where}",
        "",
        f"    python bench/disaggregation.py --transport {options.transport}",
        "",
        f"{describe()}. Shape `{bench.plan.shape}`, random weights, chunks of {bench.plan.chunk} tokens; "
        f"{bench.plan.repeats} prompts of each kind, one after the other. {seconds:.0f} s in all.",
        "",
        f"Link: {rate / 1e9:.1f} GB/s (torch copy, {bench.plan.link_bytes / GIB:.3g} GiB). Answers of the pair that are "
        f"those of one engine, token by token: {bench.num_equal} of {bench.num_compared}.",
        "",
        "| prompt | | first token, one GPU | first token, the pair | keys and values | by shared memory | copied at "
        "| of the link | from question to end |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in found:
        for name in ("new", "known"):
            one_ms, both_ms = each[f"{name}_ms"]
            copied = each[f"{name}_copy_rate"]
            lines.append(
                f"| {each['tokens']} | {name} | {one_ms:.1f} ms | {both_ms:.1f} ms | {each[f'{name}_bytes'] / 1e6:.1f} MB "
                f"| {each[f'{name}_shared']:.0%} | {copied / 1e9:.2f} GB/s | {copied / rate:.0%} "
                f"| {each[f'{name}_transfer_ms']:.1f} ms |"
            )
    lines += [
        "",
        "*Known*: the prompt is in the prefill's prefix cache, and all of it is to be had at once. *New*: it is computed, "
        "and fetched chunk by chunk. *From question to end* includes the wait for the prefill.",
        "",
    ]
    return "\n".join(lines)


# Pairs of `--rows`: those of this checkout with rows and without them, and the other's.
NOW, BARE, OTHER = "the pair", "without rows", "the other checkout"


def measure_rows(pairs: dict[str, ServerPair], plan: Plan, length: int) -> dict[str, Any]:
    """Seconds until the first token of one known prompt, of one engine and of each pair, by turns."""
    prompt = Bench(pairs[NOW], plan).prompt(length)
    for pair in pairs.values():
        # Nobody has it yet; then pools are mapped.
        pair.prefill.stream(prompt)
        pair.stream(prompt)
    seconds: dict[str, list[float]] = {name: [] for name in ("one engine", *pairs)}
    num_equal, names = 0, list(pairs)
    for number in range(plan.repeats):
        alone = pairs[NOW].prefill.stream(prompt)
        seconds["one engine"].append(alone.first_s)
        # In another order each time.
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            answer = pairs[name].stream(prompt)
            seconds[name].append(answer.first_s)
            num_equal += answer.output_ids == alone.output_ids
    medians = {name: statistics.median(each) * MILLI for name, each in seconds.items()}
    say("rows", tokens=length, **medians)
    return {"tokens": length, "seconds": seconds, "equal": num_equal, "compared": plan.repeats * len(names)}


def report_rows(found: list[dict[str, Any]], plan: Plan, load: float, seconds: float) -> str:
    names = list(found[0]["seconds"])
    head = ["prompt", *names, *(f"rows cost, {name}" for name in names if name in (NOW, OTHER))]
    head += [f"{NOW} / {OTHER}"] if OTHER in names else []
    lines = [
        f"{describe()}. Shape `{plan.shape}`, random weights; first token of a known prompt in ms, medians of "
        f"{plan.repeats} (quartiles), by turns. {seconds:.0f} s in all, load average when it began: {load:.1f}. Answers "
        f"that are those of one engine, token by token: {sum(each['equal'] for each in found)} of "
        f"{sum(each['compared'] for each in found)}.",
        "",
        "| " + " | ".join(head) + " |",
        "| --- " * len(head) + "|",
    ]
    for each in found:
        times = {name: np.array(values) * MILLI for name, values in each["seconds"].items()}
        cells = [str(each["tokens"]), *(spread(values, 1) for values in times.values())]
        cells += [spread(times[name] - times[BARE], 1) for name in (NOW, OTHER) if name in times]
        cells += [spread(times[NOW] / times[OTHER], 2)] if OTHER in times else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def spread(values: np.ndarray, digits: int) -> str:
    low, middle, high = np.percentile(values, (25, 50, 75))
    return f"{middle:.{digits}f} ({low:.{digits}f} .. {high:.{digits}f})"


def run_rows(options: argparse.Namespace) -> int:
    plan, load, began = ROWS, os.getloadavg()[0], time.monotonic()
    if options.quick:
        plan = replace(plan, prompts=(256, 2048), repeats=3)
    pairs: dict[str, ServerPair] = {}
    with tempfile.TemporaryDirectory(prefix="waybill-") as model:
        write_config(plan.shape, Path(model))
        flags = flags_of(plan, model, options)
        starts = {NOW: (sys.executable, flags), BARE: (sys.executable, [one for one in flags if one != WITH_ROWS])}
        starts |= {OTHER: (options.against, flags)} if options.against else {}
        try:
            for name, (python, own) in starts.items():
                pairs[name] = ServerPair(own, ["--disable-prefix-cache"], options.device, python)
            say("started", seconds=time.monotonic() - began)
            found = [measure_rows(pairs, plan, length) for length in plan.prompts]
        finally:
            for pair in pairs.values():
                pair.close()
    print(report_rows(found, plan, load, time.monotonic() - began), flush=True)
    say("done")
    return 0


def flags_of(plan: Plan, model: str, options: argparse.Namespace) -> list[str]:
    """Of both servers. A prompt is known for as long as one other takes."""
    room = 3 * max(plan.prompts)
    flags = ["--model", model, "--load-format", "dummy", "--device", options.device, "--tp", "1"]
    flags += ["--kv-cache-tokens", str(room), "--context-length", str(max(plan.prompts) + plan.chunk)]
    flags += ["--chunked-prefill-size", str(plan.chunk), "--max-running-requests", "8"]
    flags += [WITH_ROWS, "--disaggregation-transport", options.transport]
    return flags + (["--num-threads", "1"] if options.device == "cpu" else [])


def run(options: argparse.Namespace) -> int:
    plan = QUICK if options.quick else FULL
    began = time.monotonic()
    rate = link_rate(plan, options.device)
    say("link", bytes_per_s=rate)
    with tempfile.TemporaryDirectory(prefix="waybill-") as model:
        write_config(plan.shape, Path(model))
        pair = ServerPair(flags_of(plan, model, options), ["--disable-prefix-cache"], options.device)
        try:
            say("started", seconds=time.monotonic() - began)
            bench = Bench(pair, plan)
            bench.warm_up()
            say("warm", seconds=time.monotonic() - began)
            found = [bench.measure(length) for length in plan.prompts]
        finally:
            pair.close()
    text = report(found, rate, bench, options, time.monotonic() - began)
    print(text, flush=True)
    if options.write:
        write_result("disaggregation_gpu.md", text)
    say("done")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cuda: two devices")
    parser.add_argument(
        "--transport", choices=("auto", "shared", "tcp", "nixl"), default="shared", help="of keys and values"
    )
    parser.add_argument("--quick", action="store_true", help="a toy shape and short prompts")
    parser.add_argument("--write", action="store_true", help="keep the report in bench/results")
    parser.add_argument("--rows", action="store_true", help="what rows cost, of known prompts")
    parser.add_argument("--against", metavar="PYTHON", help="with --rows: of another checkout's environment")
    options = parser.parse_args()
    if (options.write and options.rows) or (options.against and not options.rows):
        parser.error("--write is without --rows, --against with it")
    if options.device == "cuda" and torch.cuda.device_count() < 2:
        parser.error(f"--device cuda: needs two devices, there are {torch.cuda.device_count()}")
    return run_rows(options) if options.rows else run(options)


if __name__ == "__main__":
    sys.exit(main())
