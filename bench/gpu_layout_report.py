"""Layouts of two devices beside one, all on the same machine in one call: runs `gpu_layouts.py` for each, and reports.

A layout that fails or takes too long is said to, and the others are measured all the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from gpu_layouts import MARK
from gpu_limits import Share
from gpu_plan import FULL, MILLI, TOY, Report
from machine import describe, write_result
from make_models import write_config

LAST_WORDS = 80


def kill_all(pid: int) -> None:
    """A process and all that it has started."""
    agent = psutil.Process(pid)
    for process in (agent, *agent.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def start_layout(name: str, model: str, options: argparse.Namespace) -> subprocess.Popen[str]:
    """In processes of its own, which wait behind their imports until `go_file` is there."""
    share = LAYOUTS[name]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(share.dp * share.tp), str(Path(__file__).with_name("gpu_layouts.py"))]
    command += ["--model", model, "--device", options.device, "--dp", str(share.dp), "--tp", str(share.tp)]
    command += ["--moe-split", share.moe_split, *(["--toy"] if options.toy else [])]
    command += ["--no-profile"] if "profile" in options.skip else []
    batches = (TOY if options.toy else FULL).batches
    if name == BASE:
        # Also as many as two dp ranks have in all, where they fit.
        batches = tuple(sorted({*batches, *(2 * batch for batch in batches[:-1])}))
    command += ["--batches", *map(str, batches), "--go-file", str(go_file(name, model))]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )


def go_file(name: str, model: str) -> Path:
    return Path(model) / f"{name}.go"


def run_layout(name: str, model: str, child: subprocess.Popen[str], options: argparse.Namespace) -> Found:
    """Have the processes begin, and read what they print until they end, with their time at the latest."""
    found = Found(name)
    go_file(name, model).touch()
    timer = threading.Timer(options.layout_timeout, kill_all, (child.pid,))
    timer.start()
    began, last = time.monotonic(), deque[str](maxlen=LAST_WORDS)
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith(MARK):
            result = json.loads(line.removeprefix(MARK))
            found.results.setdefault(result.pop("kind"), []).append(result)
            print(f"{name}, {time.monotonic() - began:.0f} s: {line.removeprefix(MARK).rstrip()}", flush=True)
        else:
            last.append(line)
    status = child.wait()
    timer.cancel()
    if not found.of("done"):
        late = time.monotonic() - began >= options.layout_timeout
        found.failure = f"killed after {options.layout_timeout:.0f} s" if late else f"exit status {status}"
        print(f"{name}: {found.failure}", *last, sep="\n", flush=True)
    return found


def run_layouts(names: list[str], model: str, options: argparse.Namespace) -> list[Found]:
    """One after the other; while one is measured, the processes of the next import their libraries."""
    all_found = []
    children = [start_layout(names[0], model, options)]
    try:
        for index, name in enumerate(names):
            children += [start_layout(following, model, options) for following in names[index + 1 : index + 2]]
            all_found.append(run_layout(name, model, children[index], options))
    finally:
        for child in children:
            if child.poll() is None:
                kill_all(child.pid)
    return all_found


def compare_layouts(names: list[str], options: argparse.Namespace) -> None:
    report = Report()
    with tempfile.TemporaryDirectory(prefix="waybill-layouts-") as model:
        write_config("toy30b" if options.toy else "30b", Path(model))
        all_found = run_layouts(names, model, options)
    report.add("# Layouts of two devices", "", describe() + ".", "", *SETTING.strip().splitlines(), "")
    for found in all_found:
        for each in found.of("limits"):
            rates = f"copy {each['bytes_per_s'] / 1e12:.2f} TB/s, matrices {each['flops_per_s'] / 1e12:.0f} TFLOP/s"
            report.add(f"- {found.name}: {rates}")
        if found.failure:
            report.add(f"- {found.name}: {found.failure}; what is below is what came before")
    for title, table in (("Decode", decode_table), ("Prefill", prefill_table), ("A decode step", profile_table)):
        report.add("", f"## {title}", "", *table(all_found))
    print(json.dumps({found.name: {"failure": found.failure, **found.results} for found in all_found}))
    if options.write:
        write_result("gpu_layouts.md", "\n".join(report.lines) + "\n")
    if any(found.failure for found in all_found):
        raise SystemExit(1)


SETTING = """
`bench/gpu.py --layouts`: each layout in processes of its own, one after the other on this machine. Qwen3-30B-A3B with
random weights, bfloat16, routes captured, tokens choosing their experts independently (`spread_routes`), 512 tokens of
context in decode; leaders driven step by step, a real output processor beside them. Medians. tp1 is one device; tp2-tp and
tp2-ep are two with experts cut or whole; dp2 is two attention groups (all_gather). "Over tp1" is over tp1 with as many
requests in all, "as many a group" over tp1 with as many as each group has; for 512 one GPU of 80 GB has no memory.

**Host**: what the leader does for a step - planning, agreement, launch, what it makes of the step before - without its
wait for the device; it runs while the step before is computed. A peer's host launches and no more.

**Busiest rank**: choices of experts that fall on it, over the mean of the ranks.

**Share** of the layout's own limit: what the bytes of the rank that reads most allow at this run's copy bandwidth (its
weights, the experts that were read, keys and values; in prefill its operations at the matrix rate, if they take longer),
plus what the collectives of hidden states take by themselves, inside a CUDA graph; over the measured time of a step. Of
several dp ranks each has its own device, so their limits are one rank's.
"""
