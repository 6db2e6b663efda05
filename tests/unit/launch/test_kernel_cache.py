"""What a rank's kernels are compiled to outlives the run: Triton's folder is the user's, not the run's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# The agent as far as torchrun, and then a program that has the environment of a rank.
START = """
import os, subprocess, sys
from waybill.launch import agent

script = "import json, os; print(json.dumps(dict(os.environ)))"
agent.torchrun = lambda arguments: subprocess.run([sys.executable, "-c", script], check=True)
os.mkdir(sys.argv[1])
sys.exit(agent.run_agent(sys.argv[1], []))
"""
# All that its place depends on.
NAMES = ("HOME", "TRITON_CACHE_DIR", "TRITON_HOME", "TRITON_CACHE_MANAGER", "TRITON_ALWAYS_COMPILE")


def environment_of_a_rank(run_dir: Path, **variables: str) -> dict[str, str]:
    given = {name: value for name, value in os.environ.items() if name not in NAMES[1:]} | variables
    started = [sys.executable, "-c", START, str(run_dir)]
    done = subprocess.run(started, env=given, capture_output=True, text=True, check=True)
    assert not run_dir.exists()
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("variables", [{}, {"TRITON_CACHE_DIR": "/kept/here"}, {"TRITON_HOME": "/kept"}])
def test_two_runs_keep_kernels_in_one_place(tmp_path: Path, variables: dict[str, str]) -> None:
    runs = [environment_of_a_rank(tmp_path / name, HOME="/home/somebody", **variables) for name in ("first", "second")]
    expected = {"HOME": "/home/somebody", **variables}
    for run in runs:
        assert {name: run[name] for name in NAMES if name in run} == expected
