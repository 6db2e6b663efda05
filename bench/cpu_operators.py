"""The operators in C++ alone, at model M's sizes: one instruction set beside another, and beside torch without them.

Sets take turns in every round, so that what else the machine does touches all alike; each call takes the next of several
layers, so that no weights are found in a cache. Weights are on huge pages, as an engine's; what these are worth for
reading is measured beside.

    python bench/cpu_operators.py [--rounds 7] [--sets amx_bf16 avx512_bf16 off] [--write]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import cycle

import torch
import torch.nn.functional as F
from machine import describe, write_result
from rich import box
from rich.console import Console
from rich.table import Table

from waybill.parallel.cpu_ops.attention import Pages, attention_native
from waybill.parallel.cpu_ops.experts import experts_native
from waybill.parallel.cpu_ops.library import SWITCH, supported_sets
from waybill.parallel.cpu_ops.linear import linear_native
from waybill.parallel.huge_pages import prefer_huge_pages
from waybill.parallel.moe.experts import experts_by_group

HIDDEN, EXPERTS, TOP_K, WIDTH, OUTPUTS = 1024, 64, 8, 512, 4096
HEADS, KV_HEADS, HEAD_WIDTH, PAGE_SIZE = 16, 4, 64, 16
NUM_LAYERS, NUM_MATRICES = 6, 24
TOKENS = (1, 8, 32, 512, 2048)
LONG_BYTES = 512 << 20
TERA, GIGA, MILLI = 1e12, 1e9, 1e3


@dataclass(frozen=True)
class Case:
    """`call` with the operators, `plain` with torch; what it multiplies, and reads of weights."""

    name: str
    call: Callable[[], object]
    plain: Callable[[], object] | None
    flops: float
    weight_bytes: float


def weights(*shape: int) -> torch.Tensor:
    """Of the variance that keeps that of their input."""
    made = torch.empty(shape, dtype=torch.bfloat16)
    prefer_huge_pages(made)
    return made.normal_(std=shape[-1] ** -0.5)


def expert_cases() -> list[Case]:
    layers = cycle([(weights(EXPERTS, 2 * WIDTH, HIDDEN), weights(EXPERTS, HIDDEN, WIDTH)) for _ in range(NUM_LAYERS)])
    cases = []
    for num_tokens in TOKENS:
        hidden = torch.randn(num_tokens, HIDDEN).bfloat16()
        ids = torch.rand(num_tokens, EXPERTS).argsort(1)[:, :TOP_K].contiguous()
        shares = torch.full((num_tokens, TOP_K), 1 / TOP_K)
        arguments = (hidden, ids, shares)
        pair = 3 * HIDDEN * WIDTH
        cases.append(
            Case(
                f"experts, T = {num_tokens}",
                lambda arguments=arguments: experts_native(*arguments, *next(layers)),
                lambda arguments=arguments: experts_by_group(*arguments, *next(layers)),
                2 * pair * num_tokens * TOP_K,
                2 * pair * len(ids.unique()),
            )
        )
    return cases


def linear_cases() -> list[Case]:
    matrices = cycle([weights(OUTPUTS, HIDDEN) for _ in range(NUM_MATRICES)])
    cases = []
    for num_tokens in TOKENS:
        x = torch.randn(num_tokens, HIDDEN).bfloat16()
        cases.append(
            Case(
                f"linear of {OUTPUTS} outputs, T = {num_tokens}",
                lambda x=x: linear_native(x, next(matrices)),
                lambda x=x: F.linear(x, next(matrices)),
                2 * num_tokens * HIDDEN * OUTPUTS,
                2 * HIDDEN * OUTPUTS,
            )
        )
    return cases


def attention_cases() -> list[Case]:
    cases = []
    for num_queries, num_keys in ((1, 512), (1, 2048), (512, 512), (2048, 2048)):
        query = torch.randn(num_queries, HEADS, HEAD_WIDTH).bfloat16()
        keys, values = (torch.randn(num_keys, KV_HEADS, HEAD_WIDTH).bfloat16() for _ in range(2))
        tables = torch.arange(num_keys // PAGE_SIZE, dtype=torch.int32)[None]
        pages = Pages(tables, torch.tensor([[0], [num_queries], [num_keys]]), PAGE_SIZE)
        arguments = (query, keys, values, pages, HEAD_WIDTH**-0.5)
        seen = num_queries * (num_keys - num_queries) + num_queries * (num_queries + 1) / 2
        cases.append(
            Case(
                f"attention, {num_keys} keys, T = {num_queries}",
                lambda arguments=arguments: attention_native(*arguments),
                None,
                4 * HEADS * HEAD_WIDTH * seen,
                0,
            )
        )
    return cases


def timed(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def measure(case: Case, sets: Sequence[str], rounds: int) -> dict[str, float]:
    """Median seconds of each set; the first round fills caches."""
    times: dict[str, list[float]] = {name: [] for name in sets if name != "off" or case.plain is not None}
    for number in range(rounds + 1):
        for name, taken in times.items():
            os.environ[SWITCH] = name
            function = case.call if name != "off" or case.plain is None else case.plain
            elapsed = timed(function)
            if number:
                taken.append(elapsed)
    return {name: statistics.median(taken) for name, taken in times.items()}


def read_rates(rounds: int) -> tuple[float, float]:
    """Bytes a second of torch's sum of a long tensor, on pages of 4 KiB and on huge ones; medians, by turns."""
    tensors = [torch.empty(LONG_BYTES // 4) for _ in range(2)]
    prefer_huge_pages(tensors[1])
    times: list[list[float]] = [[], []]
    for tensor in tensors:
        tensor.fill_(1.0)
    for _ in range(rounds):
        for tensor, taken in zip(tensors, times, strict=True):
            taken.append(timed(tensor.sum))
    small, huge = (LONG_BYTES / statistics.median(taken) for taken in times)
    return small, huge


def make_table(sets: Sequence[str], rounds: int) -> Table:
    table = Table(box=box.MARKDOWN)
    for heading in ("operator", *(f"{name}, ms" for name in sets), "rate of the first", "first / second"):
        table.add_column(heading, justify="left" if heading == "operator" else "right")
    for case in (*expert_cases(), *linear_cases(), *attention_cases()):
        medians = measure(case, sets, rounds)
        best = medians[sets[0]]
        read = f"{case.weight_bytes / best / GIGA:.0f} GB/s, " if case.weight_bytes else ""
        shown = [f"{medians[name] * MILLI:.2f}" if name in medians else "" for name in sets]
        ratio = f"{best / medians[sets[1]]:.2f}" if len(sets) > 1 else ""
        table.add_row(case.name, *shown, f"{read}{case.flops / best / TERA:.2f} TFLOP/s", ratio)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the CPU operators.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sets", nargs="+", default=[*supported_sets()[:2], "off"], help=f"values of {SWITCH}")
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results/cpu_operators.md")
    options = parser.parse_args()
    torch.manual_seed(0)
    small, huge = read_rates(options.rounds)
    table = make_table(options.sets, options.rounds)
    text = StringIO()
    Console(file=text, width=120).print(table)
    rows = "\n".join(line.rstrip() for line in text.getvalue().strip().splitlines())
    machine = f"{describe()}, {torch.get_num_threads()} threads"
    rates = f"{small / GIGA:.1f} GB/s on pages of 4 KiB, {huge / GIGA:.1f} on huge ones: {huge / small:.2f} times"
    report = f"""# Operators in C++, one instruction set beside another

{machine}. Sizes of model M, bfloat16; T tokens; {options.rounds} rounds of each by turns, medians. "off" is torch.
Reading {LONG_BYTES >> 20} MiB (torch's sum): {rates}.

{rows}

Made by `python bench/cpu_operators.py --write`.
"""
    print(report)
    if options.write:
        write_result("cpu_operators.md", report)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
