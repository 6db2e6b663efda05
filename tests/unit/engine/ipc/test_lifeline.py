"""A child ends when its parent is gone, cut off, or was gone before it looked."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

from waybill.engine.ipc.lifeline import EXIT_ORPHANED, Lifeline

CHILD = """
import sys, threading
from waybill.engine.ipc.lifeline import watch_lifeline
watch_lifeline(sys.argv[1])
print("watching", flush=True)
threading.Event().wait()
"""
PARENT = """
import subprocess, sys
from waybill.engine.ipc.lifeline import Lifeline
lifeline = Lifeline(sys.argv[1])
child = subprocess.Popen([sys.executable, "-c", sys.argv[2], sys.argv[1]], stdout=subprocess.PIPE, text=True)
assert child.stdout.readline() == "watching\\n"
print(child.pid, flush=True)
sys.stdin.readline()
"""
WAIT_S = 20


def start_child(path: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", CHILD, path], stdout=subprocess.PIPE, text=True)


def test_cutting_ends_every_child(tmp_path: Path) -> None:
    lifeline = Lifeline(str(tmp_path / "alive"))
    children = [start_child(lifeline.path) for _ in range(2)]
    for child in children:
        assert child.stdout is not None and child.stdout.readline() == "watching\n"
    lifeline.cut()
    assert [child.wait(WAIT_S) for child in children] == [EXIT_ORPHANED] * 2


def test_the_parents_death_ends_the_child(tmp_path: Path) -> None:
    path = str(tmp_path / "alive")
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, path, CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child_pid = int(parent.stdout.readline())
    child = os.pidfd_open(child_pid)
    parent.kill()
    parent.wait(WAIT_S)
    assert select.select([child], [], [], WAIT_S)[0], "the child lives on"
    os.close(child)


def test_a_child_that_looks_too_late(tmp_path: Path) -> None:
    assert start_child(str(tmp_path / "gone")).wait(WAIT_S) == EXIT_ORPHANED
    lifeline = Lifeline(str(tmp_path / "cut"))
    lifeline.cut()
    assert start_child(lifeline.path).wait(WAIT_S) == EXIT_ORPHANED
