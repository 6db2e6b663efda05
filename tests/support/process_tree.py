"""Processes of a run, by what they are, and what a run has left behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil

DEADLINE_S = 10.0


def leftovers(run_dir: str) -> list[str]:
    """Processes that mention the run's folder, and the folder itself."""
    found = [run_dir] if Path(run_dir).exists() else []
    for process in psutil.process_iter(["cmdline"]):
        if process.pid != os.getpid() and any(run_dir in part for part in process.info["cmdline"] or []):
            found.append(" ".join(process.info["cmdline"]))
    return found


def wait_until_gone(run_dir: str, pids: list[int]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while leftovers(run_dir) or any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"left behind: {leftovers(run_dir)} {[p for p in pids if is_alive(p)]}"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def children_of(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def find(processes: list[psutil.Process], *words: str) -> psutil.Process:
    """The one whose command line has all `words`."""
    for process in processes:
        line = " ".join(process.cmdline())
        if all(word in line for word in words):
            return process
    raise AssertionError(f"no process has {words}")


def ranks_of(processes: list[psutil.Process]) -> dict[int, psutil.Process]:
    return {
        int(process.environ()["RANK"]): process
        for process in processes
        if "waybill.launch.worker" in process.cmdline() and "RANK" in process.environ()
    }


def processes_of_run(run_dir: str) -> list[psutil.Process]:
    """Of a run that this process has started; others may run beside it."""
    return [one for one in children_of(os.getpid()) if any(run_dir in part for part in one.cmdline())]


def ranks_of_run(run_dir: str) -> list[psutil.Process]:
    """The same, its ranks, in their order."""
    return [rank for _, rank in sorted(ranks_of(processes_of_run(run_dir)).items())]


def process_of(processes: list[psutil.Process], name: str) -> psutil.Process:
    if name == "output processor":
        return find(processes, "waybill.engine.output.output_processor")
    if name == "agent":
        return find(processes, "waybill.launch.agent")
    return ranks_of(processes)[int(name[-1])]
