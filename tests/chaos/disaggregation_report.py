"""The campaign of faults between two sides as a command, and its figures as a page in `bench/results`."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from collections import Counter

from machine import describe, write_result

from .disaggregation import BOUND_S, KINDS, Result, campaign, serial_run
from .witness import Judge


def summary(results: list[Result]) -> list[str]:
    lines = [
        "| fault | trials | failed | answers that were right | errors | callers that left | longest wait |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind in (*KINDS, "all"):
        of = [result for result in results if kind in (result.kind, "all")]
        if of:
            lines.append(
                f"| {kind} | {len(of)} | {sum(bool(each.faults) for each in of)} | {sum(each.num_right for each in of)} "
                f"| {sum(each.num_errors for each in of)} | {sum(each.num_left for each in of)} "
                f"| {max(each.wait_s for each in of):.1f} s |"
            )
    return lines


def page(results: list[Result], transports: Counter[str], judge: Judge, seconds: float) -> str:
    shown = ", ".join(f"{count} by {name}" for name, count in transports.items())
    return "\n".join(
        [
            "# Faults between a prefill's side and a decode's",
            "",
            "    make chaos-disaggregation ARGS=--write",
            "",
            f"{describe()}. {len(results)} trials in {seconds:.0f} s; transport: {shown}. Nobody may wait longer than "
            f"{BOUND_S:.0f} s; {judge.num_right} answers had the serial run's tokens and rows, {judge.num_by_near_ties} "
            "differed within near-ties. After each trial both sides must come to rest with every page free or cached, the "
            "next question must be answered rightly, a side that has ended must have left no process, file or shared "
            "memory, and the decode's side must map no pool of an engine that is gone.",
            "",
            *summary(results),
            "",
            *[f"- {result.line()}: {'; '.join(result.faults)}" for result in results if result.faults],
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="chaos.disaggregation_report", description="Faults between two sides.")
    parser.add_argument("--seed", type=int, help="one trial, that of this seed")
    parser.add_argument("--trials", type=int, default=100, help="as many, of seeds in a row")
    parser.add_argument("--first", type=int, default=0, help="the first of these seeds")
    parser.add_argument("--only", choices=KINDS, help="of this kind")
    parser.add_argument("--transport", choices=("both", "shared", "tcp"), default="both", help="of keys and values")
    parser.add_argument("--minutes", type=float, default=60.0, help="no trial begins later")
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results/chaos_disaggregation.md")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    judge, began = Judge(serial_run()), time.monotonic()
    results, transports = asyncio.run(campaign(options, judge))
    text = page(results, transports, judge, time.monotonic() - began)
    print(text)
    if options.write:
        write_result("chaos_disaggregation.md", text)
    return 1 if any(result.faults for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
