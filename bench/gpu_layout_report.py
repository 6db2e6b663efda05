"""Layouts of several devices beside one, all on the same machine in one call, and what the largest dp shows beside: runs a
script for each part, and reports.

A part that fails or takes too long is said to, and the others are run all the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from gpu_layout_plan import LAYOUTS, largest_dp, layouts_for, totals_of
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
from gpu_layout_text import PROCESSORS, ROUTES, SETTING, STALL
from gpu_plan import FULL, TOY, Report
from machine import describe, write_result
from make_models import write_config
from marked_results import NOT_RUN, Found, keep, kill_all, load_kept, read_results, start

# Ranks of a dry run, which has no devices to count.
TOY_DEVICES = 8
# Of the scripts that follow the layouts, for their dry runs: what makes them small.
TOY_STALL = ("--shape", "toy30b", "--history", "200", "--rounds", "1", "--turns", "3")
TOY_PROCESSORS = ("--shape", "toy30b", "--requests", "8", "--tokens", "8")


def script(name: str) -> str:
    return str(Path(__file__).with_name(f"{name}.py"))


def start_layout(name: str, model: str, options: argparse.Namespace) -> subprocess.Popen[str]:
    """In processes of its own, which wait behind their imports until `go_file` is there."""
    share = LAYOUTS[name]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(share.world), script("gpu_layouts")]
    command += ["--model", model, "--device", options.device, "--dp", str(share.dp), "--tp", str(share.tp)]
    command += ["--moe-split", share.moe_split, *(["--toy"] if options.toy else [])]
    command += ["--no-profile"] if "profile" in options.skip else []
    totals = totals_of(name, TOY if options.toy else FULL)
    return start([*command, "--totals", *map(str, totals), "--go-file", str(go_file(name, model))])


def go_file(name: str, model: str) -> Path:
    return Path(model) / f"{name}.go"


def run_layouts(names: list[str], model: str, options: argparse.Namespace) -> list[Found]:
    """One after the other; while one is measured, the processes of the next import their libraries."""
    all_found = []
    children = [start_layout(names[0], model, options)]
    try:
        for index, name in enumerate(names):
            children += [start_layout(following, model, options) for following in names[index + 1 : index + 2]]
            go_file(name, model).touch()
            all_found.append(read_results(name, children[index], options.layout_timeout))
    finally:
        for child in children:
            if child.poll() is None:
                kill_all(child.pid)
    return all_found


def run_part(part: str, name: str, arguments: list[str], options: argparse.Namespace) -> Found:
    """A script with the device that all have; nothing where the part is not wanted, or needs more ranks than there are."""
    if part in options.skip or not arguments:
        return Found(part, failure=NOT_RUN)
    command = [sys.executable, script(name), *arguments, "--device", options.device]
    return read_results(part, start(command), options.part_timeout)


def run_all(allowed: list[str], options: argparse.Namespace) -> list[Found]:
    """Layouts, and the parts that follow them."""
    all_found = []
    if "speed" not in options.skip:
        with tempfile.TemporaryDirectory(prefix="waybill-layouts-") as model:
            write_config("toy30b" if options.toy else "30b", Path(model))
            all_found = run_layouts(allowed, model, options)
    toy, dp = options.toy, largest_dp(allowed)
    on_dp = ["--dp", str(dp)] if dp > 1 else []
    return [
        *all_found,
        run_part("routes", "gpu_layout_routes", [*allowed, *(["--toy"] if toy else [])], options),
        run_part("stall", "stall_everywhere", [*on_dp, *(TOY_STALL if toy and on_dp else ())], options),
        run_part("processors", "gpu_processors", [*on_dp, *(TOY_PROCESSORS if toy and on_dp else ())], options),
    ]


def make_report(kept: dict[str, Found], num_devices: int) -> Report:
    """Of what this call and earlier ones have found."""
    report = Report()
    all_found = [kept[name] for name in LAYOUTS if name in kept]
    report.add(f"# Layouts of up to {num_devices} devices", "", describe() + ".", "", *SETTING.strip().splitlines(), "")
    report.add(*notes(all_found, [name for name in LAYOUTS if name not in kept]))
    for title, table in (
        ("Decode", decode_table),
        ("Prefill", prefill_table),
        ("A decode step", profile_table),
        ("The next limit", limit_table),
    ):
        report.add("", f"## {title}", "", *table(all_found))
    for title, part, text, table_of_part in (
        ("Routes in float32", "routes", ROUTES, route_table),
        ("A finish somewhere in most steps", "stall", STALL, stall_table),
        ("The output processor", "processors", PROCESSORS, processor_table),
    ):
        found = kept.get(part, Found(part, failure=NOT_RUN))
        report.add("", f"## {title}", "", *text.strip().splitlines(), "", *table_of_part(found))
    return report


def compare_layouts(names: list[str], options: argparse.Namespace) -> None:
    num_devices = torch.cuda.device_count() if options.device == "cuda" else TOY_DEVICES
    allowed, not_run = layouts_for(names, num_devices)
    if not_run:
        print(f"{num_devices} devices are too few for {', '.join(not_run)}", flush=True)
    kept = load_kept(options.kept)
    all_found = [found for found in run_all(allowed, options) if found.failure != NOT_RUN]
    kept |= {found.name: found for found in all_found}
    keep(options.kept, kept)
    report = make_report(kept, num_devices)
    print(json.dumps({found.name: {"failure": found.failure, **found.results} for found in all_found}))
    if options.write:
        name = "gpu_layouts.md" if num_devices <= 2 else f"gpu_layouts_{num_devices}.md"
        write_result(name, "\n".join(report.lines) + "\n")
    if any(found.failure for found in all_found):
        raise SystemExit(1)
