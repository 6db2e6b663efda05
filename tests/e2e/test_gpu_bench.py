"""The GPU benchmark's dry run: the leader in a benchmark's process, with a real output processor beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.py"


@pytest.mark.matrix
def test_every_workload_is_measured_at_a_toy_size() -> None:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--toy", "--skip", "correctness", "capture", "profile"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout.splitlines()[-1])
    assert {name.split(",")[0] for name in numbers} == {"decode", "prefill"}
    assert all(of["tokens_per_s"] > 0 and of["share"] > 0 for of in numbers.values())


@pytest.mark.matrix
def test_layouts_are_measured_beside_one_device() -> None:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--toy", "--layouts", "tp1", "dp2", "--skip", "profile"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # One device also decodes as many as both groups have in all.
    assert [each["total"] for each in found["tp1"]["decode"]] == [1, 2, 4]
    assert [each["total"] for each in found["dp2"]["decode"]] == [2, 8]
    for layout in found.values():
        assert all(each["tokens_per_s"] > 0 and each["share"] > 0 for each in layout["decode"] + layout["prefill"])
