"""The figures as a page and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter

COLOURS = {"delta": "tab:blue", "full": "tab:red", "stream": "tab:green"}
MARKERS = {"delta": "o", "full": "s", "stream": "^"}
LABELS = {
    "delta": "delta: the rows of a turn",
    "full": "full: the whole history with every answer",
    "stream": "stream: delta, and each token's text at once",
}
FORWARD = "20"
# Milliseconds of a step, by line.
NEEDED = {"10": ":", "20": "--", "50": "-."}


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def to_markdown(result: dict[str, Any]) -> str:
    parts = [
        "# Simulation of the output side\n\n`python bench/simulate.py`, see [docs/scaling.md](../../docs/scaling.md).\n"
        f"{result['machine']}; one thread copies {result['copy_bytes_s'] / 1e9:.1f} GB/s.",
        "CPU milliseconds of the output processor a step. `before`: records filed segment by segment and every slice "
        "copied twice (`bench/simulation/before.py`), in turns of ten steps of one run.",
        _costs(result["runs"]),
        f"With a forward of {FORWARD} ms: rows/s needed and possible, the lag when steps end, and the dp size where one "
        "output processor would be busy all the time.",
        _lags(result["runs"]),
        "Filing while every rank prefills chunks, and what a leader's own host work costs.",
        _prefills(result["prefill"]),
        _leaders(result["runs"]),
    ]
    if result["live"]:
        parts += [
            "The same records played in real time to an output processor process of its own (both threads, ipc), beside "
            "the virtual clock.",
            _live(result["live"]),
        ]
    parts.append("![rows/s and lag over dp](simulate.png)")
    return "\n\n".join(parts) + "\n"


def _costs(runs: list[dict[str, Any]]) -> str:
    rows = []
    for run in runs:
        now, before = run["output"], run["output_before"]
        rows.append(
            [
                f"dp {run['dp']} {run['variant']}",
                f"{run['rows_per_step']:,.0f}",
                f"{100 * run['finish_share']:.0f} %",
                f"{run['bytes_shipped_per_step'] / 1e6:.2f}",
                *(f"{now[part]:.2f}" for part in ("receive_ms", "file_ms", "ship_ms", "all_ms")),
                f"{before['all_ms']:.2f}" if before else "-",
                f"{before['all_ms'] / now['all_ms']:.2f}" if before else "-",
            ]
        )
    head = ["", "rows/step", "steps with a finish", "MB shipped", "receive", "file", "ship", "all", "before", "ratio"]
    return table(head, rows)


def _lags(runs: list[dict[str, Any]]) -> str:
    rows = []
    for run in runs:
        lag, before = run["lag"][FORWARD], run["lag_before"]
        rows.append(
            [
                f"dp {run['dp']} {run['variant']}",
                f"{run['needed_rows_s'][FORWARD]:,.0f}",
                f"{run['output']['capacity_rows_s']:,.0f}",
                f"{100 * lag['utilisation']:.0f} %",
                f"{before[FORWARD]['utilisation']:.0%}".replace("%", " %") if before else "-",
                f"{1e3 * lag['behind_s']:.1f} / {1e3 * lag['max_behind_s']:.1f}",
                f"{lag['records_waiting']:.0f}",
                f"{lag['slots_occupied']:.0f} / {lag['max_slots_occupied']}",
                f"{100 * lag['ring_wait_share']:.0f} %",
                f"{run['limit_dp'][FORWARD]:,.0f}",
            ]
        )
    head = ["", "rows/s", "possible", "busy", "busy before", "ms behind (max)", "records waiting", "slots (max)"]
    return table([*head, "engine waits", "limit, dp"], rows)


def _prefills(prefills: list[dict[str, Any]]) -> str:
    head = ["", "rows/step", "rows/s possible", "before", "ratio"]
    return table(
        head,
        [
            [
                f"dp {item['dp']}",
                f"{item['rows_per_step']:,.0f}",
                f"{item['rows_s']:,.0f}",
                f"{item['rows_s_before']:,.0f}",
                f"{item['rows_s'] / item['rows_s_before']:.1f}",
            ]
            for item in prefills
        ],
    )


def _leaders(runs: list[dict[str, Any]]) -> str:
    rows = [
        [
            f"dp {run['dp']} {run['variant']}",
            f"{run['leader_us']['median']:.0f}",
            f"{run['leader_us']['p99']:.0f}",
            f"{1e3 * run['frontend_link_ms']:.0f}",
        ]
        for run in runs
    ]
    return table(["microseconds a step", "one leader, median", "p99", "frontend: requests and their numbers"], rows)


def _live(live: list[dict[str, Any]]) -> str:
    rows = [
        [
            f"dp {item['dp']} {item['variant']}",
            f"{item['forward_ms']}",
            f"{1e3 * item['virtual']['behind_s']:.1f}",
            f"{1e3 * item['virtual_two_locks']['behind_s']:.1f}",
            f"{1e3 * item['live']['behind_s']:.1f} / {1e3 * item['live']['max_behind_s']:.1f}",
            f"{item['live']['max_slots_occupied']}",
            f"{100 * item['virtual']['utilisation']:.0f} %",
            f"{100 * item['live']['cpu_share']:.0f} %",
        ]
        for item in live
    ]
    head = ["", "forward, ms", "ms behind, virtual", "shipping free", "live (max)", "slots, max", "busy, virtual"]
    return table([*head, "CPU, live"], rows)


def plot(result: dict[str, Any], file: Path) -> None:
    """The ledger as it is; the tables have the slow one too."""
    figure, (rates, lags) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    by_variant: dict[str, list[dict[str, Any]]] = {}
    for run in result["runs"]:
        by_variant.setdefault(run["variant"], []).append(run)
    first = next(iter(by_variant.values()))
    sizes = [run["dp"] for run in first]
    for variant, runs in by_variant.items():
        look = {"color": COLOURS[variant], "marker": MARKERS[variant]}
        rates.plot(sizes, [run["output"]["capacity_rows_s"] for run in runs], label=LABELS[variant], **look)
        lags.plot(sizes, [1e3 * run["lag"][FORWARD]["behind_s"] for run in runs], **look)
    for ms, style in NEEDED.items():
        needed = [run["needed_rows_s"][ms] for run in first]
        rates.plot(sizes, needed, style, color="black", marker=".", label=f"needed with a step of {ms} ms")
    lags.axhline(float(FORWARD), color="black", linestyle=NEEDED[FORWARD])
    lags.annotate(f"one step, {FORWARD} ms", (sizes[0], float(FORWARD)), (0, 4), textcoords="offset points")
    rates.set(title="Rows that one output processor files and ships", ylabel="rows/s")
    lags.set(title=f"How far it is behind, with a step of {FORWARD} ms", ylabel="ms behind, median")
    for axis in (rates, lags):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(plain))
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.set_xlabel("dp ranks, 8 requests each")
        axis.grid(True, which="both", alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(file, dpi=110)


def plain(value: float, _: int) -> str:
    """A tick of a logarithmic axis: no power of ten."""
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"
