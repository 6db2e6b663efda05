"""The figures of a campaign: by kind, and as a page in `bench/results`."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO

from machine import describe, write_result
from rich import box
from rich.console import Console
from rich.table import Table

from .campaign import Campaign
from .deck import kinds
from .harmless_trial import FAULTS
from .outcome import Outcome
from .service import HEARTBEAT_S, WEIGHT_SYNC_S
from .shared_services import MAX_GROWTH_BYTES, MAX_MORE_FDS

MIB = 1 << 20
WIDTH = 160


def summary_table(campaign: Campaign) -> Table:
    """A row for each kind that was tried."""
    table = Table(box=box.MARKDOWN)
    table.add_column("fault")
    for heading in ("trials", "failed", "skipped", "runs ended", "answers compared", "by near-ties"):
        table.add_column(heading, justify="right")
    table.add_column("longest wait, s", justify="right")
    table.add_column("bound, s", justify="right")
    for kind in kinds():
        of_kind = [outcome for outcome in campaign.outcomes if outcome.trial.kind == kind]
        if of_kind:
            table.add_row(*row_of(kind, of_kind))
    table.add_row(*row_of("all", campaign.outcomes))
    return table


def row_of(name: str, outcomes: Sequence[Outcome]) -> list[str]:
    tightest = max(outcomes, key=lambda outcome: outcome.wait_s - outcome.bound_s)
    return [
        name,
        str(len(outcomes)),
        str(sum(bool(outcome.faults) for outcome in outcomes)),
        str(sum(outcome.skipped for outcome in outcomes)),
        str(sum(outcome.result.startswith("ended") for outcome in outcomes)),
        str(sum(outcome.num_answers for outcome in outcomes)),
        str(sum(outcome.num_near_ties for outcome in outcomes)),
        f"{tightest.wait_s:.1f}",
        f"{tightest.bound_s:.0f}",
    ]


def growth_table(campaign: Campaign) -> Table:
    table = Table(box=box.MARKDOWN)
    for heading in ("service", "process", "growth, MiB"):
        table.add_column(heading, justify="right" if heading.startswith("growth") else "left")
    for shape, roles in campaign.growth.items():
        for role, growth in sorted(roles.items()):
            table.add_row(str(shape), role, f"{growth / MIB:.0f}")
    return table


def as_text(table: Table) -> str:
    console = Console(width=WIDTH, file=StringIO(), record=True)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.export_text().strip().splitlines())


def report_of(campaign: Campaign, seconds: float) -> str:
    outcomes = campaign.outcomes
    failed = [outcome for outcome in outcomes if outcome.faults]
    seeds = [outcome.trial.seed for outcome in outcomes]
    told = "\n".join(f"- {outcome.line()}" for outcome in failed) or "None failed."
    return f"""# Faults against real services

{describe()}; the campaign and its services share them. Embedded model in float32 on two ranks, tensor-parallel or
data-parallel, as `torchrun.sh serve` and as a program with an `Engine`, with routing and without.

{len(outcomes)} trials (seeds {min(seeds)} to {max(seeds)}) in {seconds / 60:.0f} minutes, with
`--heartbeat-timeout {HEARTBEAT_S:g}` and `--weight-sync-timeout {WEIGHT_SYNC_S:g}`.

The first {len(FAULTS)} kinds of faults are done to a service beside a witness, whose plain requests must be answered
as usual, with the tokens and rows of a serial run, within the bound. The others are done to a run of their own, at any
moment from its start to its shutdown, while a stream, whole answers and operations wait: the run must end, or go on and
be right. The longest wait is that of any of them, from the fault or the question on; of several bounds, the one that it
came closest to. No process, no file in the temporary folder and nothing in shared memory may be left.

{as_text(summary_table(campaign))}

{told}

What the processes of services that were used for many trials have more at the end than when they were new, at most
(limit {MAX_GROWTH_BYTES // MIB} MiB and {MAX_MORE_FDS} file descriptors):

{as_text(growth_table(campaign))}

Made by `make chaos ARGS=--write`; `make chaos ARGS="--seed N"` repeats one trial.
"""


def write_report(campaign: Campaign, seconds: float) -> None:
    write_result("chaos.md", report_of(campaign, seconds))


def print_summary(campaign: Campaign) -> None:
    Console(width=WIDTH).print(summary_table(campaign))
