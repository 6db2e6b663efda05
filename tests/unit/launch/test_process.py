"""What runs each of Waybill's processes: its imports, its arguments and its end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from waybill.launch.supervisor import PROCESS

ENDS_IN_ORDER = """
import atexit, gc, sys, threading, time

while_importing = gc.isenabled()
class Kept:
    def __del__(self):
        sys.stderr.write("taken apart\\n")
kept = Kept()

def speak_late():
    time.sleep(0.1)
    print("the thread has ended")

def main():
    assert not while_importing and gc.isenabled() and gc.get_freeze_count() > 0
    atexit.register(print, "what was registered was called")
    threading.Thread(target=speak_late).start()
    print(sys.argv[1:])
    return 3
"""
FAILS = """
def main():
    raise ValueError("the reason")
"""
LEAVES = """
import sys

def main():
    sys.exit("a usage")
"""
SAYS_NOTHING = """
def main():
    pass
"""


def run(folder: Path, source: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "some_process.py").write_text(source)
    command = [sys.executable, "-m", PROCESS, "some_process", *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True)


def test_it_ends_in_order_and_takes_nothing_apart(tmp_path: Path) -> None:
    done = run(tmp_path, ENDS_IN_ORDER, "--option", "-m")
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.splitlines() == [
        "['--option', '-m']",
        "the thread has ended",
        "what was registered was called",
    ]


@pytest.mark.parametrize(
    ("source", "status", "words"), [(FAILS, 1, "ValueError: the reason"), (LEAVES, 1, "a usage"), (SAYS_NOTHING, 0, "")]
)
def test_its_status_is_that_of_its_main(tmp_path: Path, source: str, status: int, words: str) -> None:
    done = run(tmp_path, source)
    assert done.returncode == status
    assert words in done.stderr and bool(done.stderr) == bool(words)
