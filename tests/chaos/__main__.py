"""A campaign of faults against real services: whatever is done to one of them, nobody waits beyond the bound, nothing is
left behind, and no answer is wrong.

    make chaos [ARGS="--seed 7" | "--trials 50" | "--only kill" | "--write"]

Servers and programs with an `Engine`, on two ranks, tensor-parallel and data-parallel, with routing and without. Faults
that other clients must not notice come beside a witness whose answers are compared with a serial run's, tokens and rows;
faults that a run may die of - kills, stops, limits, malformed messages inside - get a run of their own, with callers
that wait. A seed is one trial: `--seed 7` repeats that of seed 7.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time

from support.serial_run import SerialRun

from .campaign import Campaign
from .catalogue import make_questions
from .deck import Trial, deal, draw, kinds
from .outcome import Outcome
from .report import print_summary, write_report
from .witness import Judge

NUM_TRIALS = 200


def trials_of(options: argparse.Namespace) -> list[Trial]:
    """The trials that were asked for. With `--only` and one seed, those kinds under that seed."""
    if options.seed is not None:
        return [deal(options.seed, kind) for kind in options.only] or [draw(options.seed)]
    trials = [draw(seed) for seed in range(options.first, options.first + options.trials)]
    return [trial for trial in trials if not options.only or trial.kind in options.only]


def show(outcome: Outcome) -> None:
    print(outcome.line(), flush=True)
    for fault in outcome.faults:
        print(f"     {fault}", flush=True)
    if outcome.log:
        print("     | " + outcome.log.replace("\n", "\n     | "), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="chaos",
        description="Faults against real services: nobody waits too long, nothing is left, no row is wrong.",
    )
    parser.add_argument("--seed", type=int, help="one trial, that of this seed")
    parser.add_argument("--trials", type=int, default=NUM_TRIALS, help="as many, of seeds in a row")
    parser.add_argument("--first", type=int, default=0, help="the first of these seeds")
    parser.add_argument(
        "--only", choices=kinds(), metavar="KIND", nargs="+", default=[], help=f"of these kinds: {', '.join(kinds())}"
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="no trial begins later")
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results/chaos.md")
    options = parser.parse_args()
    trials = trials_of(options)
    if not trials:
        parser.error(f"none of these seeds means {', '.join(options.only)}; --seed N --only KIND makes one that does")
    began = time.monotonic()
    judge = Judge(SerialRun.of(make_questions()))
    campaign = Campaign(judge, show, deadline=began + 60 * options.minutes)
    # Also when it is told to stop it ends what it has started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    asyncio.run(campaign.run(trials))
    seconds = time.monotonic() - began
    print_summary(campaign)
    failed = [outcome for outcome in campaign.outcomes if outcome.faults]
    for fault in campaign.faults:
        print(f"chaos: {fault}", file=sys.stderr)
    print(f"chaos: {len(campaign.outcomes)} trials in {seconds:.0f} s, {len(failed)} failed")
    if options.write:
        write_report(campaign, seconds)
    return 1 if failed or campaign.faults else 0


if __name__ == "__main__":
    sys.exit(main())
