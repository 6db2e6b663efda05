"""Layouts of several devices beside one, all on the same machine in one call, and what the largest of them shows beside: runs
a script for each part, and reports.

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
from marked_results import Found, kill_all, read_results, start

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
        return Found(part, failure="not run")
    command = [sys.executable, script(name), *arguments, "--device", options.device]
    return read_results(part, start(command), options.part_timeout)


def compare_layouts(names: list[str], options: argparse.Namespace) -> None:
    num_devices = torch.cuda.device_count() if options.device == "cuda" else TOY_DEVICES
    allowed, not_run = layouts_for(names, num_devices)
    all_found = []
    if "speed" not in options.skip:
        with tempfile.TemporaryDirectory(prefix="waybill-layouts-") as model:
            write_config("toy30b" if options.toy else "30b", Path(model))
            all_found = run_layouts(allowed, model, options)
    toy, dp = options.toy, largest_dp(allowed)
    on_dp = ["--dp", str(dp)] if dp > 1 else []
    routes = run_part("routes", "gpu_layout_routes", [*allowed, *(["--toy"] if toy else [])], options)
    stall = run_part("stall", "stall_everywhere", [*on_dp, *(TOY_STALL if toy and on_dp else ())], options)
    processors = run_part("processors", "gpu_processors", [*on_dp, *(TOY_PROCESSORS if toy and on_dp else ())], options)
    report = Report()
    report.add(f"# Layouts of up to {num_devices} devices", "", describe() + ".", "")
    report.add(*SETTING.strip().splitlines(), "", *notes(all_found, not_run))
    for title, table in (
        ("Decode", decode_table),
        ("Prefill", prefill_table),
        ("A decode step", profile_table),
        ("The next limit", limit_table),
    ):
        report.add("", f"## {title}", "", *table(all_found))
    for title, text, table, found in (
        ("Routes in float32", ROUTES, route_table, routes),
        (f"A finish somewhere in most steps, dp {dp}", STALL, stall_table, stall),
        (f"The output processor, dp {dp}", PROCESSORS, processor_table, processors),
    ):
        report.add("", f"## {title}", "", *text.strip().splitlines(), "", *table(found))
    parts = [*all_found, routes, stall, processors]
    print(json.dumps({found.name: {"failure": found.failure, **found.results} for found in parts}))
    if options.write:
        name = "gpu_layouts.md" if num_devices <= 2 else f"gpu_layouts_{num_devices}.md"
        write_result(name, "\n".join(report.lines) + "\n")
    if any(found.failure not in ("", "not run") for found in parts):
        raise SystemExit(1)
