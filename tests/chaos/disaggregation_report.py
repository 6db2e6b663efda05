"""The campaigns of faults between processes that depend on each other as a command, and their figures as a page in
`bench/results`.

    make chaos-disaggregation [ARGS="--trials 20" | "--seed 7 9" | "--only kill-prefill" | "--scene encoder"]

With `--keep FILE` a campaign goes on where it was ended, and `--write` makes the page of all results that are in the file.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections import Counter
from pathlib import Path

from machine import describe, write_result

from .disaggregation import BOUND_S, KINDS, SidesScenes, serial_run
from .encoder import BOUND_S as ENCODER_BOUND_S
from .encoder import KINDS as ENCODER_KINDS
from .encoder import EncoderScenes
from .image_questions import images_with_a_serial_run
from .kept import Kept, Result
from .scene_trials import campaign
from .witness import Judge


def summary(results: list[Result], kinds: list[str]) -> list[str]:
    lines = [
        "| fault | trials | failed | answers that were right | errors | callers that left | longest wait |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind in (*kinds, "all"):
        of = [result for result in results if kind in (result.kind, "all")]
        if of:
            lines.append(
                f"| {kind} | {len(of)} | {sum(bool(each.faults) for each in of)} | {sum(each.num_right for each in of)} "
                f"| {sum(each.num_errors for each in of)} | {sum(each.num_left for each in of)} "
                f"| {max(each.wait_s for each in of):.1f} s |"
            )
    failed = [f"- {result.line()}: {'; '.join(result.faults)}" for result in results if result.faults]
    return [*lines, *(["", *failed] if failed else []), ""]


def figures(results: list[Result]) -> str:
    num_right, num_near = sum(each.num_right for each in results), sum(each.num_by_near_ties for each in results)
    return (
        f"{len(results)} trials in {sum(each.seconds for each in results):.0f} s. {num_right} answers of callers were "
        f"right: they had the serial run's tokens and rows, or differed within near-ties ({num_near} of all)."
    )


def page(kept: Kept) -> str:
    sides, encoder = kept.results("sides"), kept.results("encoder")
    transports = Counter(result.transport for result in sides)
    lines = ["# Faults between processes: prefill and decode, engine and encoder", ""]
    lines += ["    make chaos-disaggregation ARGS='--keep FILE'"]
    lines += [
        "    make chaos-disaggregation ARGS='--scene encoder --trials 30 --keep FILE --write'",
        "",
        f"{describe()}.",
        "",
    ]
    if sides:
        shown = ", ".join(f"{count} by {name}" for name, count in transports.items())
        lines += ["## A prefill's side and a decode's", ""]
        lines += [
            f"{figures(sides)} Transport: {shown}. Nobody may wait longer than {BOUND_S:.0f} s. After each trial both "
            "sides must come to rest with every page free or cached, the next question must be answered rightly, a side "
            "that has ended must have left no process, file or shared memory, and the decode's side must map no pool of an "
            "engine that is gone."
        ]
        lines += ["", *summary(sides, list(KINDS))]
    if encoder:
        lines += ["## An engine and its encoder", ""]
        lines += [
            f"{figures(encoder)} Nobody may wait longer than {ENCODER_BOUND_S:.0f} s, and nobody without an image may "
            "notice anything of what happens to the encoder. After each trial the engine must come to rest with every "
            "page free or cached and no image on its way, the next question with an image that nobody knows must be "
            "answered rightly, and an encoder that has died must have left no process, file or shared memory."
        ]
        lines += ["", *summary(encoder, list(ENCODER_KINDS))]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="chaos.disaggregation_report", description="Faults between two sides.")
    parser.add_argument("--scene", choices=("sides", "encoder", "both"), default="sides", help="what is tried")
    parser.add_argument("--seed", type=int, nargs="+", help="the trials of these seeds")
    parser.add_argument("--trials", type=int, default=100, help="as many, of seeds in a row")
    parser.add_argument("--first", type=int, default=0, help="the first of these seeds")
    parser.add_argument("--only", choices=(*KINDS, *ENCODER_KINDS), help="of this kind")
    parser.add_argument("--transport", choices=("both", "shared", "tcp"), default="both", help="of keys and values")
    parser.add_argument("--minutes", type=float, default=60.0, help="no trial begins later")
    parser.add_argument(
        "--keep", type=Path, metavar="FILE", help="append results to it; what it has is not tried again"
    )
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results/chaos_disaggregation.md")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    kept = Kept(options.keep)
    if options.scene != "encoder" and options.trials:
        asyncio.run(campaign(options, SidesScenes(Judge(serial_run()), options.transport), kept))
    if options.scene != "sides" and options.trials:
        with images_with_a_serial_run() as serial:
            asyncio.run(campaign(options, EncoderScenes(Judge(serial)), kept))
    text = page(kept)
    print(text)
    if options.write:
        write_result("chaos_disaggregation.md", text)
    return 1 if any(result.faults for scene in ("sides", "encoder") for result in kept.results(scene)) else 0


if __name__ == "__main__":
    sys.exit(main())
