"""What a rank's kernels are compiled to outlives the run: Triton's folder is the user's, not the run's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

# For each run a copy of the agent, as far as torchrun, and then a program that has the environment of a rank.
START = """
import json, os, subprocess, sys
from waybill.launch import agent

script = "import json, os; print(json.dumps(dict(os.environ)))"
agent.torchrun = lambda arguments: subprocess.run([sys.executable, "-c", script], check=True)
for variables, run_dir in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        os.environ.update(variables)
        os.mkdir(run_dir)
        os._exit(agent.run_agent(run_dir, []))
    assert os.waitpid(child, 0)[1] == 0
"""
# All that its place depends on.
NAMES = ("HOME", "TRITON_CACHE_DIR", "TRITON_HOME", "TRITON_CACHE_MANAGER", "TRITON_ALWAYS_COMPILE")
CASES: list[dict[str, str]] = [{}, {"TRITON_CACHE_DIR": "/kept/here"}, {"TRITON_HOME": "/kept"}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """For each case, the environments of ranks of two runs."""
    folder = tmp_path_factory.mktemp("runs")
    home = {"HOME": "/home/somebody"}
    asked = [(home | case, str(folder / f"{i}-{run}")) for i, case in enumerate(CASES) for run in ("first", "second")]
    given = {name: value for name, value in os.environ.items() if name not in NAMES[1:]}
    started = [sys.executable, "-c", START, json.dumps(asked)]
    done = subprocess.run(started, env=given, capture_output=True, text=True, check=True)
    assert list(folder.iterdir()) == []
    found = list(map(json.loads, done.stdout.splitlines()))
    assert len(found) == len(asked)
    return [found[i : i + 2] for i in range(0, len(found), 2)]


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: "".join(CASES[case]) or "nothing set")
def test_two_runs_keep_kernels_in_one_place(runs: list[list[dict[str, Any]]], case: int) -> None:
    expected = {"HOME": "/home/somebody", **CASES[case]}
    for run in runs[case]:
        assert {name: run[name] for name in NAMES if name in run} == expected
