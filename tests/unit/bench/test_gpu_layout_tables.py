"""The report on layouts, from what their scripts would print."""

from __future__ import annotations

from typing import Any

from gpu_layout_plan import LAYOUTS
from gpu_layout_report import make_report
from gpu_layout_tables import (
    decode_table,
    limit_table,
    notes,
    prefill_table,
    processor_table,
    profile_table,
    route_table,
    stall_table,
)
from marked_results import Found


def decode(total: int, batch: int, tokens_per_s: float, **values: Any) -> dict[str, Any]:
    given = {"total": total, "batch": batch, "tokens_per_s": tokens_per_s, "seconds": total / tokens_per_s}
    rest = {"host_s": 0.001, "experts": 8.0, "imbalance": 1.0, "bytes_s": 0.002, "wire_s": 0.0005, "share": 0.5}
    return {**given, **rest, **values}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


TP1 = Found("tp1", {"decode": [decode(1, 1, 100.0), decode(8, 8, 400.0), decode(256, 256, 9000.0)]})
DP8 = Found(
    "dp8",
    {
        "decode": [decode(1, 1, 150.0), decode(64, 8, 2000.0), decode(1024, 128, 54000.0)],
        "decode_off": [{"total": 1, "seconds": 1 / 147}],
        "profile": [{"total": 1, "wall_ms": 7.0, "busy_ms": 6.0, "idle_ms": 0.3, "launches": 9, "kernels": {"k": 5.0}}],
        "launch": [{"total": 1, "seconds": 0.0009}],
    },
)


def test_decode_is_told_over_one_device() -> None:
    """With as many requests; with the most that it has room for; not at all where it has room and was not measured."""
    lines = [cells(line) for line in decode_table([TP1, DP8])[2:]]
    over = {(line[0], int(line[1])): (line[3], line[4]) for line in lines}
    assert over["tp1", 8] == ("1.00", "1.00")
    assert over["dp8", 1] == ("1.50", "1.50")
    assert over["dp8", 64] == ("", "5.00")
    assert over["dp8", 1024] == ("6.00 (of 256)", "")
    assert [line[6] for line in lines if line[0] == "dp8"] == ["0.980", "", ""]


def test_without_one_device_there_is_nothing_to_be_over() -> None:
    assert [cells(line)[3:5] for line in decode_table([DP8])[2:]] == [["", ""]] * 3


def test_the_next_limit_is_the_largest_part() -> None:
    """Of 6.67 ms kernels run 6.00, of which bytes and collectives explain 2.5."""
    assert [cells(line) for line in limit_table([TP1, DP8])[2:]] == [
        ["dp8", "1", "2.00", "0.50", "3.50", "0.30", "0.00", "kernels"]
    ]
    slow_host = Found("tp8-tp", {"decode": [decode(1, 1, 100.0, host_s=0.012)], "profile": DP8.of("profile")})
    assert cells(limit_table([slow_host])[2])[-2:] == ["6.00", "host"]


def test_profiles_and_prefills() -> None:
    assert cells(profile_table([DP8])[2])[:4] == ["dp8", "1", "1.00", "0.90"]
    prefill = {"tokens": 8, "total": 8, "tokens_per_s": 10.0, "behind_tokens_per_s": 20.0}
    prefill |= {"bytes_s": 0.0, "flops_s": 0.0, "wire_s": 0.0, "share": 0.5}
    both = [Found("tp1", {"prefill": [prefill]}), Found("tp2-tp", {"prefill": [prefill | {"tokens_per_s": 15.0}]})]
    assert cells(prefill_table(both)[3])[3:6] == ["1.50", "20", "1.00"]


def test_what_is_missing_is_told() -> None:
    failed = Found("dp4", {"ready": [{"left_out": [512, 1024]}]}, failure="exit status 1")
    assert notes([failed], ["tp8-tp", "dp8"]) == [
        "- dp4: a device has no memory for 512, 1,024 requests",
        "- dp4: exit status 1; what is below is what came before",
        "- not run: tp8-tp, dp8",
    ]


def test_routes_that_differ_are_told() -> None:
    base = {"rows": 9, "differing": 0, "forced": 0, "tied_tokens": 0, "failure": ""}
    results = [base | {"layout": "tp1"}, base | {"layout": "dp2", "differing": 2, "failure": "position 3, gap 1"}]
    lines = route_table(Found("routes", {"routes": results}, failure="exit status 1"))
    assert cells(lines[2]) == ["tp1", "9", "0", "0", "0", "equal"]
    assert cells(lines[3])[-1] == "DIFFERS: position 3, gap 1"
    assert lines[-1] == "Incomplete: exit status 1."


def test_stalls_and_processors() -> None:
    ratio = [1.0, 0.99, 1.01]
    of_stall = {
        "variant": "full",
        "dp": 8,
        "finishes": 9,
        "steps": 20,
        "with_finish": 0.6,
        "median_ms": 3.0,
        "p99_ms": 4.0,
    }
    of_stall |= {"median_over_off": ratio, "p99_over_off": ratio, "lag_median_ms": 2.0, "lag_p99_ms": 5.0}
    of_stall |= {"processor_cpu_ms": 7.0, "caller_cpu_ms": 8.0, "ring_waits": 0}
    lines = stall_table(Found("stall", {"stall": [of_stall]}))
    assert cells(lines[2])[4:9] == ["60%", "3.00", "4.00", "1.000 [0.990, 1.010]", "1.000 [0.990, 1.010]"]
    assert lines[-1] == "The ring was full 0 times."
    of_processors = {"setting": "two nodes, one each", "dp": 2, "requests": 8, "tokens_per_s": 9.0, "step_ms": 2.0}
    of_processors |= {"lag_steps": 1.5, "lag_steps_max": 3, "ring_waits": 0, "cpu_shares": [0.25, 0.5]}
    line = cells(processor_table(Found("processors", {"processors": [of_processors]}))[2])
    assert line == ["two nodes, one each", "2", "8", "9", "2.00", "1.50", "3", "3.0", "0", "25.0%, 50.0%"]
    assert stall_table(Found("stall", failure="not run"))[-1] == "Incomplete: not run."


def test_a_report_has_what_all_calls_have_found() -> None:
    """In the order of the layouts, not that of the calls."""
    lines = make_report({"dp8": DP8, "tp1": TP1}, 8).lines
    assert lines[0] == "# Layouts of up to 8 devices"
    assert [cells(line)[0] for line in lines if line.startswith(("| tp1", "| dp8"))][:6] == ["tp1"] * 3 + ["dp8"] * 3
    assert lines.count("Incomplete: not run.") == 3
    assert "- not run: " + ", ".join(name for name in LAYOUTS if name not in ("tp1", "dp8")) in lines
